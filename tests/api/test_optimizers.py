"""Optimizer families over HTTP: what is chosen with a run, and what a step may then say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.calls import BASE_MODEL, TOKENS, datum, post, post_proto, proto_body, result
from tests.api.conftest import Served
from tuft.api.optimizers import step_params
from tuft.types import AdamParams, DimuonParams, OptimizerParams

DIMUON = {"type": "dimuon", "version": 1}


@pytest.mark.parametrize(
    ("content", "params"),
    [
        (b'{"adam_params": {"learning_rate": 1}}', AdamParams(1.0)),
        (b'{"optimizer_params": {"type": "adamw", "beta1": 0.5}}', AdamParams(beta1=0.5)),
        (b'{"optimizer_params": {"type": "dimuon", "learning_rate": 1, "new": 2}}', DimuonParams(1.0)),
        (  # as SDK 0.30.2 sends it
            b'{"optimizer_params": {"type": "dimuon", "learning_rate": 1e-3, "grad_clip_norm": 0.0, "beta1": 0.9,'
            b' "damping": 0.0001, "rank_lr_correction_exponent": 0.175}}',
            DimuonParams(1e-3, 0.0, 0.9, 1e-4, 0.175),
        ),
    ],
)
def test_params_are_read_as_their_type_says(content: bytes, params: OptimizerParams) -> None:
    assert step_params(content) == params


def saved_dimuon(server: Served, session_id: str) -> tuple[str, str]:
    """A run of dimuon after a step, and the path of its checkpoint."""
    fields = {"base_model": BASE_MODEL, "lora_config": {"rank": 4}, "optimizer_config": DIMUON}
    created = post(server.alice, "create_model", session_id=session_id, model_seq_id=1, **fields)
    run_id = result(server.alice, created)["model_id"]
    post_proto(server.alice, proto_body(run_id, 1, [datum(TOKENS)]))
    params = {"type": "dimuon", "learning_rate": 0.1}
    post(server.alice, "optim_step", model_id=run_id, seq_id=2, optimizer_params=params)
    saved = post(server.alice, "save_weights", model_id=run_id, seq_id=3, path="moved")
    return run_id, result(server.alice, saved)["path"]


def config_of(server: Served, run_id: str) -> dict[str, Any]:
    config: dict[str, Any] = post(server.alice, "get_info", model_id=run_id).json()["optimizer_config"]
    return config


def test_a_run_made_of_a_checkpoint_has_its_optimizer_only_if_that_is_loaded(server: Served, session_id: str) -> None:
    run_id, path = saved_dimuon(server, session_id)
    assert config_of(server, run_id) == DIMUON
    assert post(server.alice, "weights_info", tinker_path=path).json()["optimizer_config"] == DIMUON
    for number, (fields, config) in enumerate(
        [
            ({"optimizer": True}, DIMUON),
            ({"optimizer": True, "optimizer_config": DIMUON}, DIMUON),
            ({"optimizer": False}, {"type": "adamw"}),  # "defaults to Adam", says the SDK
            ({"optimizer": False, "optimizer_config": DIMUON}, DIMUON),
        ]
    ):
        made = post(server.alice, "load_weights", session_id=session_id, model_seq_id=number + 2, path=path, **fields)
        assert config_of(server, result(server.alice, made)["model_id"]) == config
    adamw = {"optimizer": True, "optimizer_config": {"type": "adamw"}}
    refused = post(server.alice, "load_weights", session_id=session_id, model_seq_id=9, path=path, **adamw)
    assert refused.status_code == 400
    assert "its optimizer is 'dimuon', the run's is 'adamw': load the weights alone" in refused.json()["detail"]


def test_a_live_run_keeps_its_optimizer(server: Served, session_id: str) -> None:
    run_id, path = saved_dimuon(server, session_id)
    for number, (fields, complaint) in enumerate(
        [
            ({"optimizer": True}, None),
            ({"optimizer": False, "optimizer_config": DIMUON}, None),
            (
                {"optimizer": False, "optimizer_config": {"type": "adamw"}},
                "the run's optimizer is 'dimuon' for as long",
            ),
        ]
    ):
        loaded = result(
            server.alice, post(server.alice, "load_weights", model_id=run_id, seq_id=number + 4, path=path, **fields)
        )
        assert complaint in loaded["error"] if complaint else loaded["path"] == path
