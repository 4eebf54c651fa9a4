"""Bodies: how much is read, how they are decompressed, and how a wrong field is named."""

from __future__ import annotations

from typing import Any

import pytest
import zstandard

from tests.api.calls import LIMIT_BYTES, TOKENS, datum, post, post_proto, proto_body, result, settled
from tests.api.conftest import Served
from tuft.api import body
from tuft.api.optimizers import OptimStep, step_params
from tuft.api.training import CreateModel, Envelope
from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.types import AdamParams, LoraSpec

LIMITS = LimitsSection()
ZSTD = {"Content-Encoding": "zstd"}


def test_a_compressed_body_is_the_same_request(server: Served, run_id: str) -> None:
    plain = post_proto(server.alice, proto_body(run_id, 1, [datum(TOKENS)], forward_only=True))
    packed = zstandard.ZstdCompressor().compress(proto_body(run_id, 2, [datum(TOKENS)], forward_only=True))
    compressed = post_proto(server.alice, packed, **ZSTD)
    assert result(server.alice, plain) == result(server.alice, compressed)


def test_a_body_over_the_limit_fails_its_own_operation_and_no_other(server: Served, run_id: str) -> None:
    huge = proto_body(run_id, 1, [datum(list(range(300)) * 1000)])
    assert len(huge) > LIMIT_BYTES
    submitted = post_proto(server.alice, huge)
    after = post_proto(server.alice, proto_body(run_id, 2, [datum(TOKENS)]))
    failed = result(server.alice, submitted)
    assert failed["category"] == "user"
    assert f"more than {LIMIT_BYTES} bytes" in failed["error"]
    assert "loss_fn_outputs" in result(server.alice, after)


def test_a_body_that_grows_over_the_limit_fails_the_same_way(server: Served, run_id: str) -> None:
    bomb = zstandard.ZstdCompressor().compress(proto_body(run_id, 1, [datum([7] * 2**18)]))
    assert len(bomb) < LIMIT_BYTES / 100
    failed = result(server.alice, post_proto(server.alice, bomb, **ZSTD))
    assert "when decompressed" in failed["error"]


def test_a_body_over_the_limit_without_an_envelope_is_413(server: Served) -> None:
    response = server.alice.post("/api/v1/create_session", content=b" " * (LIMIT_BYTES + 1))
    assert response.status_code == 413
    assert f"more than {LIMIT_BYTES} bytes" in response.json()["detail"]


@pytest.mark.parametrize(
    ("content", "encoding", "complaint"),
    [
        (b"no zstd at all", "zstd", "must be one zstd frame"),
        (zstandard.ZstdCompressor().compress(b"{}" * 9000)[:-4], "zstd", "must be one zstd frame"),
        (zstandard.ZstdCompressor().compress(b"{}") * 2, "zstd", "must be one zstd frame"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"{}"), "zstd", "must declare its content size"),
        (b"{}", "gzip", "Content-Encoding: got 'gzip'; must be zstd or absent"),
        (b"{", "identity", "body: got '{'; must be JSON"),
        (b"[]", "identity", "body: got []; must be an object"),
        (b"\xff", "identity", "must be JSON"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(server: Served, content: bytes, encoding: str, complaint: str) -> None:
    response = server.alice.post("/api/v1/optim_step", content=content, headers={"Content-Encoding": encoding})
    assert response.status_code == 400
    assert complaint in response.json()["detail"]


def test_what_an_old_sdk_leaves_out_has_the_sdks_default() -> None:
    minimal = body.parse(CreateModel, b'{"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {}}')
    assert minimal.lora_config == LoraSpec(rank=32, seed=None, train_attn=True, train_mlp=True, train_unembed=True)
    assert step_params(b'{"adam_params": {"learning_rate": 1}}') == AdamParams(1.0, 0.9, 0.95, 1e-12, 0.0, 0.0)


def test_fields_of_a_later_sdk_are_ignored() -> None:
    content = b'{"session_id": "s", "model_seq_id": 0, "base_model": "m", "new": {"a": 1}, "lora_config": {"x": 2}}'
    assert body.parse(CreateModel, content).base_model == "m"


@pytest.mark.parametrize(
    ("model", "content", "complaint"),
    [
        (CreateModel, b'{"session_id": "s", "model_seq_id": 0}', "base_model: got None; is required"),
        (Envelope, b'{"model_id": "r", "seq_id": "1"}', "seq_id: got '1'; must be a valid integer"),
        (Envelope, b'{"model_id": "r", "seq_id": true}', "seq_id: got True; must be a valid integer"),
        (Envelope, b'{"model_id": "r", "seq_id": 0}', "seq_id: got 0; must be greater than or equal to 1"),
        (OptimStep, b'{"adam_params": {"beta1": "x"}}', "adam_params.beta1: got 'x'; must be a valid number"),
        (OptimStep, b'{"adam_params": 3}', "adam_params: got 3; must be an object"),
    ],
)
def test_a_wrong_field_is_named_with_the_value_seen(model: Any, content: bytes, complaint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        body.parse(model, content)
    assert str(caught.value) == complaint


def test_metadata_values_become_texts() -> None:
    assert body.texts({"a": "b", "n": 1, "d": {"x": None}}, LIMITS) == {"a": "b", "n": "1", "d": '{"x": null}'}
    assert body.texts(None, LIMITS) == {}


def test_metadata_that_no_list_could_show_is_refused(server: Served) -> None:
    largest = {"a": "é" * ((LIMITS.max_metadata_bytes - 1) // 2)}
    assert post(server.alice, "create_session", user_metadata=largest).status_code == 200
    response = post(server.alice, "create_session", user_metadata={**largest, "b": 1})
    assert response.status_code == 400
    assert response.json()["detail"] == (
        f"user_metadata: got '{2**14 + 1} bytes'; must be at most {2**14} (limits.max_metadata_bytes)"
    )


def test_what_fits_of_a_cut_off_frame_is_kept_for_its_envelope(server: Served, run_id: str) -> None:
    incompressible = [datum([(7919 * i * i) % 384 for i in range(300)], weights=[i / 7 for i in range(299)])] * 900
    packed = zstandard.ZstdCompressor(level=1).compress(proto_body(run_id, 1, incompressible))
    plain = packed + b"\0" * (LIMIT_BYTES + 1 - len(packed))  # over the limit before it is decompressed
    response = post_proto(server.alice, plain, **ZSTD)
    failed = settled(server.alice, response.json()["request_id"]).json()
    assert f"more than {LIMIT_BYTES} bytes" in failed["error"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"project_id": "a\0b"}, "project_id"),
        ({"tags": ["fine", "a\0b"]}, "tags.1"),
        ({"user_metadata": {"key": "a\0b"}}, "user_metadata.key"),
        ({"user_metadata": {"a\0b": "value"}}, "user_metadata"),
    ],
)
def test_a_text_with_a_nul_is_refused_by_its_field(server: Served, fields: dict[str, Any], named: str) -> None:
    response = post(server.alice, "create_session", **fields)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(f"{named}: got ")
    assert response.json()["detail"].endswith("; must hold no NUL character")


def test_an_escaped_backslash_before_u0000_is_no_nul(server: Served) -> None:
    response = post(server.alice, "create_session", tags=["\\u0000"])
    assert response.status_code == 200
