"""Requests of forward_backward: what the SDK encodes is what we read, and nothing malformed gets further than this."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tinker.proto.request_conv import forward_backward_request_to_proto

from tuft.api import wire
from tuft.api.proto import wire_pb2
from tuft.config import LimitsSection
from tuft.errors import InvalidInput, TooLarge, UserError

LIMITS = LimitsSection(max_request_bytes=2**20, max_data=4096, max_chunks=2**14, max_names=64)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


def sdk_body(
    data: list[tinker.Datum], config: dict[str, float | str] | None = None, *, seq_id: int = 1, forward: bool = False
) -> bytes:
    message = forward_backward_request_to_proto(
        tinker.types.ForwardBackwardRequest(
            forward_backward_input=tinker.types.ForwardBackwardInput(
                data=data, loss_fn="cross_entropy", loss_fn_config=config
            ),
            model_id="session:train:0",
            seq_id=seq_id,
        )
    )
    message.forward_only = forward
    return bytes(message.SerializeToString())


def datum(tokens: list[int], **inputs: Any) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


@given(TOKENS, npst.arrays(np.float32, st.integers(0, 20)), npst.arrays(np.int64, npst.array_shapes(max_dims=2)))
def test_what_the_sdk_encodes_comes_out_bit_for_bit(tokens: list[int], weights: Any, targets: Any) -> None:
    body = sdk_body([datum(tokens, weights=weights, target_tokens=targets), datum([7], weights=weights)])
    first, second = wire.decode_loss_request(body, LIMITS).data
    assert first.tokens_T.tolist() == tokens
    assert first.tokens_T.dtype == np.int64
    np.testing.assert_array_equal(first.loss_fn_inputs["weights"], weights)
    np.testing.assert_array_equal(first.loss_fn_inputs["target_tokens"], targets)
    assert first.loss_fn_inputs["target_tokens"].dtype == np.int64
    assert second.loss_fn_inputs["weights"].dtype == np.float32
    assert second.tokens_T.tolist() == [7]


@given(npst.arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(1, 30)), elements=st.integers(0, 3)))
def test_two_dimensional_targets_come_out_dense_whether_sent_sparse_or_not(targets: Any) -> None:
    body = sdk_body([datum([1], target_tokens=torch.from_numpy(targets))])
    (decoded,) = wire.decode_loss_request(body, LIMITS).data
    np.testing.assert_array_equal(decoded.loss_fn_inputs["target_tokens"], targets)


def test_the_sdk_does_send_mostly_empty_targets_sparse() -> None:
    targets = torch.zeros(4, 32, dtype=torch.int64)
    targets[2, 5] = 9
    body = sdk_body([datum([1], target_tokens=targets)])
    message = wire_pb2.ForwardBackwardRequest.FromString(body)
    assert message.data[0].loss_fn_inputs["target_tokens"].HasField("sparse_csr")
    (decoded,) = wire.decode_loss_request(body, LIMITS).data
    np.testing.assert_array_equal(decoded.loss_fn_inputs["target_tokens"], targets.numpy())


def test_dense_arrays_are_views_and_no_copies() -> None:
    (decoded,) = wire.decode_loss_request(sdk_body([datum([1], weights=[0.5])]), LIMITS).data
    weights = decoded.loss_fn_inputs["weights"]
    assert not weights.flags.owndata
    assert not weights.flags.writeable


def test_several_chunks_are_one_prompt() -> None:
    model_input = tinker.ModelInput.from_ints([1, 2]).append(tinker.types.EncodedTextChunk(tokens=[3]))
    body = sdk_body([tinker.Datum(model_input=model_input, loss_fn_inputs={})])
    (decoded,) = wire.decode_loss_request(body, LIMITS).data
    assert decoded.tokens_T.tolist() == [1, 2, 3]


def test_the_narrow_dtypes_are_widened_exactly() -> None:
    message = wire_pb2.ForwardBackwardRequest()
    inputs = message.data.add().loss_fn_inputs
    numbers = torch.tensor([1.5, -2.0, float("inf"), 3.0e38]).bfloat16()
    inputs["bf16"].dense = numbers.view(torch.int16).numpy().tobytes()
    inputs["bf16"].dtype = wire_pb2.DTYPE_BFLOAT16
    inputs["int32"].dense = np.array([-1, 2**31 - 1], dtype="<i4").tobytes()
    inputs["int32"].dtype = wire_pb2.DTYPE_INT32
    (decoded,) = wire.decode_loss_request(message.SerializeToString(), LIMITS).data
    np.testing.assert_array_equal(decoded.loss_fn_inputs["bf16"], numbers.float().numpy())
    assert decoded.loss_fn_inputs["int32"].tolist() == [-1, 2**31 - 1]
    assert decoded.loss_fn_inputs["int32"].dtype == np.int64


def test_config_v2_is_preferred_and_keeps_texts() -> None:
    body = sdk_body([datum([1])], {"clip_low_threshold": 0.7, "mode": "token"})
    assert wire.decode_loss_request(body, LIMITS).loss_fn_config == {"clip_low_threshold": 0.7, "mode": "token"}
    message = wire_pb2.ForwardBackwardRequest(loss_fn_config={"a": 1.0, "b": 2.0})
    message.loss_fn_config_v2["a"].number = 3.0
    assert wire.decode_loss_request(message.SerializeToString(), LIMITS).loss_fn_config == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize("forward", [False, True])
def test_forward_only_means_no_backward(forward: bool) -> None:
    assert wire.decode_loss_request(sdk_body([datum([1])], forward=forward), LIMITS).backward is not forward


@given(TOKENS, npst.arrays(np.float32, st.integers(0, 20), elements=st.floats(-1e6, 1e6, width=32)))
def test_json_says_the_same_as_protobuf(tokens: list[int], weights: Any) -> None:
    targets = torch.tensor([[0] * 9 + [5]] * 4)
    sent = datum(tokens, weights=weights, target_tokens=targets)
    in_proto = wire.decode_loss_request(sdk_body([sent], {"beta": 0.1}), LIMITS)
    fields = {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": tokens, "type": "encoded_text"}]},
                "loss_fn_inputs": {
                    "weights": {"data": weights.tolist(), "dtype": "float32", "shape": [len(weights)]},
                    "target_tokens": {
                        "data": [5] * 4,
                        "dtype": "int64",
                        "shape": [4, 10],
                        "sparse_crow_indices": [0, 1, 2, 3, 4],
                        "sparse_col_indices": [9] * 4,
                    },
                },
            }
        ],
        "loss_fn": "cross_entropy",
        "loss_fn_config": {"beta": 0.1},
        "of_a_later_sdk": 1,
    }
    in_json = wire.decode_loss_request_json(fields, LIMITS, backward=True, field="forward_backward_input")
    assert in_json.loss_fn == in_proto.loss_fn
    assert in_json.loss_fn_config == in_proto.loss_fn_config
    (a,), (b,) = in_json.data, in_proto.data
    assert a.tokens_T.tolist() == b.tokens_T.tolist()
    for name in ("weights", "target_tokens"):
        np.testing.assert_array_equal(a.loss_fn_inputs[name], b.loss_fn_inputs[name])
        assert a.loss_fn_inputs[name].dtype == b.loss_fn_inputs[name].dtype


def test_json_chunks_of_old_sdks_need_no_type() -> None:
    assert wire.prompt_tokens_json({"chunks": [{"tokens": [1]}, {"tokens": [2]}]}, "prompt", LIMITS).tolist() == [1, 2]


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_invalid_input(body: bytes) -> None:
    for decode in (lambda: wire.decode_loss_request(body, LIMITS), lambda: wire.scan_envelope(body)):
        with contextlib.suppress(InvalidInput):
            decode()


@given(st.data())
def test_a_damaged_request_raises_nothing_but_user_errors_and_keeps_its_envelope(data: st.DataObject) -> None:
    targets = torch.tensor([[0] * 9 + [5]] * 4)
    body = bytearray(sdk_body([datum([1, 2], weights=[0.1, 0.2], target_tokens=targets)], {"beta": 0.5}, seq_id=300))
    envelope_bytes = 2 + len("session:train:0") + 3
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(envelope_bytes, len(body) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(body[: data.draw(st.integers(envelope_bytes, len(body)))])
    assert wire.scan_envelope(damaged) == ("session:train:0", 300)
    with contextlib.suppress(UserError):
        wire.decode_loss_request(damaged, LIMITS)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_json_of_any_shape_raises_nothing_but_user_errors(data: st.DataObject) -> None:
    tensor: dict[str, Any] = {"data": [1, 2], "dtype": "int64", "shape": [2], "sparse_crow_indices": None}
    chunk: dict[str, Any] = {"type": "encoded_text", "tokens": [1, 2]}
    item: dict[str, Any] = {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {"target_tokens": tensor}}
    request: dict[str, Any] = {"data": [item], "loss_fn": "cross_entropy", "loss_fn_config": {"a": 1.0}}
    target = data.draw(st.sampled_from([tensor, chunk, item, item["model_input"], item["loss_fn_inputs"], request]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON_VALUES)
    with contextlib.suppress(UserError):
        wire.decode_loss_request_json(request, LIMITS, backward=True, field="forward_backward_input")


def sparse_message(shape: list[int], crow: list[int], col: list[int], num_values: int) -> bytes:
    message = wire_pb2.ForwardBackwardRequest()
    tensor = message.data.add().loss_fn_inputs["weights"]
    tensor.dtype = wire_pb2.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = np.ones(num_values, dtype="<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, dtype="<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(col, dtype="<i8").tobytes()
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("shape", "crow", "col", "num_values", "field"),
    [
        ([4], [0, 1], [0], 1, "shape"),
        ([2, -1], [0, 0, 0], [], 0, "shape"),
        ([2, 2], [0, 1], [0], 1, "crow_indices"),
        ([2, 2], [0, 2, 1], [0], 1, "crow_indices"),
        ([2, 2], [1, 1, 1], [0], 1, "crow_indices"),
        ([2, 2], [0, 1, 1], [2], 1, "col_indices"),
        ([2, 2], [0, 1, 1], [-1], 1, "col_indices"),
        ([2, 2], [0, 2, 2], [1, 1], 2, "col_indices"),
        ([2, 2], [0, 1, 1], [], 1, "col_indices"),
    ],
)
def test_a_wrong_sparse_tensor_is_named(
    shape: list[int], crow: list[int], col: list[int], num_values: int, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.decode_loss_request(sparse_message(shape, crow, col, num_values), LIMITS)
    assert caught.value.field == f"data[0].loss_fn_inputs.weights.{field}"


def test_a_small_request_cannot_ask_for_a_huge_dense_tensor() -> None:
    body = sparse_message([2, 2**31], [0, 0, 0], [], 0)
    with pytest.raises(TooLarge, match="dense"):
        wire.decode_loss_request(body, LIMITS)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        ({"data": [1.5], "dtype": "int64"}, "data: got 1.5; must be a list of 64-bit integers"),
        ({"data": [2**63], "dtype": "int64"}, "data: got 'a number of more than 64 bits'"),
        ({"data": ["1"], "dtype": "float32"}, "data: got '1'; must be a list of numbers"),
        ({"data": [True], "dtype": "int64"}, "data: got True; must be a list of 64-bit integers"),
        ({"data": [[1], [2, 3]], "dtype": "int64"}, r"data: got \[1\]; must be a list"),
        ({"data": [1], "dtype": "bfloat16"}, "dtype: got 'bfloat16'; must be 'float32' or 'int64'"),
        ({"data": [1, 2], "dtype": "int64", "shape": [3]}, r"shape: got \[3\]; must hold as many elements"),
        ({"data": [1], "dtype": "int64", "shape": [1, 1, 1]}, r"shape: got \[1, 1, 1\]; must be 1 or 2 lengths"),
    ],
)
def test_a_wrong_json_tensor_is_named_with_value_and_rule(tensor: dict[str, Any], complaint: str) -> None:
    request = {"data": [{"model_input": {"chunks": []}, "loss_fn_inputs": {"weights": tensor}}], "loss_fn": "x"}
    with pytest.raises(InvalidInput, match=r"^input\.data\[0\]\.loss_fn_inputs\.weights\." + complaint):
        wire.decode_loss_request_json(request, LIMITS, backward=True, field="input")


@pytest.mark.parametrize(
    "chunk",
    [
        tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=3),
        tinker.types.DmelChunk(dmel=b"sound"),
    ],
)
def test_other_chunks_than_text_are_refused_by_name(chunk: Any) -> None:
    body = sdk_body([tinker.Datum(model_input=tinker.ModelInput(chunks=[chunk]), loss_fn_inputs={})])
    with pytest.raises(InvalidInput, match=r"data\[0\]\.model_input\[0\]: got '(image|dmel)'; must be encoded_text"):
        wire.decode_loss_request(body, LIMITS)
    with pytest.raises(InvalidInput, match=r"prompt\.chunks\[0\]\.type: got '(image|dmel)'; must be encoded_text"):
        wire.prompt_tokens_json({"chunks": [{"type": chunk.type, "data": ""}]}, "prompt", LIMITS)


def test_the_envelope_is_found_behind_other_fields_too() -> None:
    request = wire_pb2.ForwardBackwardRequest(model_id="s:train:1", seq_id=5, loss_fn="x", forward_only=True)
    reordered = b"\x22\x01x" + b"\x30\x01" + request.SerializeToString()
    assert wire.scan_envelope(reordered) == ("s:train:1", 5)


@pytest.mark.parametrize("seq_id", [0, -1])
def test_a_seq_that_is_not_positive_is_no_envelope(seq_id: int) -> None:
    body = wire_pb2.ForwardBackwardRequest(model_id="s:train:1", seq_id=seq_id).SerializeToString()
    with pytest.raises(InvalidInput):
        wire.scan_envelope(body)


@pytest.mark.parametrize("field", ["model_input_spans", "loss_fn_input_spans"])
def test_more_spans_than_tokens_are_refused_before_they_are_read(field: str) -> None:
    message = wire_pb2.ForwardBackwardRequest(model_id="run", seq_id=1)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(2, dtype="<i4").tobytes()
    for _ in range(3):
        getattr(datum, field).add()
    with pytest.raises(InvalidInput, match=rf"data\[0\].{field}: got '3 spans'; must be at most one"):
        wire.decode_loss_request(message.SerializeToString(), LIMITS)


def too_much(part: str) -> wire_pb2.ForwardBackwardRequest:
    message = wire_pb2.ForwardBackwardRequest(model_id="run", seq_id=1)
    for _ in range(LIMITS.max_data + 1 if part == "data" else 1):
        datum = message.data.add()
    for number in range(LIMITS.max_chunks + 1):
        match part:
            case "model_input":
                datum.model_input.add()
            case "loss_fn_inputs":
                datum.loss_fn_inputs[str(number)].dtype = 1
            case "loss_fn_config":
                message.loss_fn_config[str(number)] = 1.0
    return message


@pytest.mark.parametrize("part", ["data", "model_input", "loss_fn_inputs", "loss_fn_config"])
def test_more_than_a_client_has_reason_to_send_is_refused_before_it_is_read(part: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{part}: got '\d+ of them'; must be at most"):
        wire.decode_loss_request(too_much(part).SerializeToString(), LIMITS)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"data": [{}] * (LIMITS.max_data + 1)}, "p.data"),
        ({"data": [{"model_input": {"chunks": [{}] * (LIMITS.max_chunks + 1)}}]}, r"p.data\[0\].model_input.chunks"),
        ({"data": [], "loss_fn_config": dict.fromkeys(map(str, range(99)), 1.0)}, "p.loss_fn_config"),
    ],
    ids=["data", "chunks", "config"],
)
def test_so_it_is_in_json(payload: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=f"{field}: got '\\d+ of them'; must be at most"):
        wire.decode_loss_request_json({"loss_fn": "ppo", **payload}, LIMITS, backward=True, field="p")
