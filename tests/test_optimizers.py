from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tuft.errors import InvalidInput
from tuft.optimizers import check_step
from tuft.types import AdamParams, DimuonParams, OptimizerParams

ADAM, DIMUON = AdamParams(), DimuonParams(learning_rate=0.1)


@pytest.mark.parametrize(
    "params",
    [ADAM, DIMUON, replace(DIMUON, learning_rate=0.0, grad_clip_norm=-1.0, rank_lr_correction_exponent=-0.5)],
)
def test_what_can_be_honoured_passes(params: OptimizerParams) -> None:
    check_step(params, params.family)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        (replace(ADAM, learning_rate=math.nan), "adam_params.learning_rate: got nan; must be finite and not negative"),
        (replace(ADAM, weight_decay=-1.0), "adam_params.weight_decay: got -1.0; must be finite and not negative"),
        (replace(ADAM, beta2=1.0), "adam_params.beta2: got 1.0; must be below 1"),
        (replace(ADAM, grad_clip_norm=-1.0), "adam_params.grad_clip_norm: got -1.0; must be finite and not negative"),
        (replace(DIMUON, learning_rate=-1.0), "optimizer_params.learning_rate: got -1.0; must be finite and not neg"),
        (replace(DIMUON, beta1=1.0), "optimizer_params.beta1: got 1.0; must be below 1"),
        (replace(DIMUON, beta1=-0.1), "optimizer_params.beta1: got -0.1; must be finite and not negative"),
        (replace(DIMUON, grad_clip_norm=math.inf), "optimizer_params.grad_clip_norm: got inf; must be finite"),
        (replace(DIMUON, damping=0.0), "optimizer_params.damping: got 0.0; must be above 0"),
    ],
)
def test_what_cannot_be_honoured_is_named(params: OptimizerParams, complaint: str) -> None:
    with pytest.raises(InvalidInput) as error:
        check_step(params, params.family)
    assert str(error.value).startswith(complaint)


def test_params_of_another_family_name_both() -> None:
    with pytest.raises(InvalidInput, match=r"^adam_params: got 'adamw'; the run's optimizer is 'dimuon'"):
        check_step(ADAM, "dimuon")
    with pytest.raises(InvalidInput, match=r"^optimizer_params: got 'dimuon'; the run's optimizer is 'adamw'"):
        check_step(DIMUON, "adamw")
