"""What is refused before it enters a shared batch, and how it is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.models.test_lora import CONFIG
from tuft.engine.base import RunLoss
from tuft.engine.checks import check_part
from tuft.errors import InvalidInput
from tuft.types import Datum

GOOD = Datum(np.array([1, 2, 3]), {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32)})


def operation(*data: Datum, loss_fn: str = "cross_entropy", **config: float | str) -> RunLoss:
    return RunLoss("a", data, loss_fn, tuple(config.items()))


def changed(**inputs: np.ndarray) -> Datum:
    return replace(GOOD, loss_fn_inputs={**GOOD.loss_fn_inputs, **inputs})


@pytest.mark.parametrize(
    "datum",
    [
        GOOD,
        changed(target_tokens=np.array([[2, 3], [3, 4], [5, 6]]), weights=np.ones((3, 2), np.float32)),
        Datum(GOOD.tokens_T, {"target_tokens": GOOD.loss_fn_inputs["target_tokens"]}),
    ],
)
def test_good_data_pass(datum: Datum) -> None:
    check_part(operation(GOOD, datum), CONFIG)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (operation(), "data: got 0; must hold at least one datum"),
        (operation(GOOD, loss_fn="hinge"), "loss_fn: got 'hinge'; must be one of cross_entropy"),
        (operation(GOOD, beta=0.1), "loss_fn_config.beta: got 0.1"),
        (operation(GOOD, weights="many"), "loss_fn_config.weights: got 'many'"),
        (operation(replace(GOOD, tokens_T=np.arange(0))), "data[0].model_input.length: got 0; must be 1 to 128 tokens"),
        (operation(GOOD, replace(GOOD, tokens_T=np.array([1, -2, 3]))), "data[1].model_input[1]: got -2; must be a to"),
        (operation(replace(GOOD, tokens_T=np.array([1.0, 2.0, 3.0]))), "data[0].model_input.dtype: got 'float64'"),
        (operation(changed(target_tokens=np.array([2, 3, 96]))), "loss_fn_inputs.target_tokens[2]: got 96; must be a "),
        (operation(changed(target_tokens=np.array([2, 3]))), "target_tokens.shape: got (2,); must be (3,) or (3, K)"),
        (operation(replace(GOOD, loss_fn_inputs={})), "data[0].loss_fn_inputs.target_tokens: got 'missing'"),
        (operation(changed(weights=np.ones(2, np.float32))), "loss_fn_inputs.weights.shape: got (2,); must be that of"),
        (operation(changed(weights=np.array([1, np.nan, 1]))), "data[0].loss_fn_inputs.weights[1]: got nan; must be f"),
        (operation(changed(weights=np.array([1, 1, 1e39]))), "data[0].loss_fn_inputs.weights[2]: got 1e+39; must be f"),
        (
            operation(changed(weights=np.array(["a", "b", "c"]))),
            "loss_fn_inputs.weights.dtype: got '<U1'; must be number",
        ),
    ],
)
def test_bad_operations_are_refused_by_datum_and_field(bad: RunLoss, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        check_part(bad, CONFIG)
    assert message in str(error.value)


def test_inputs_that_only_another_loss_reads_may_ride_along() -> None:
    check_part(operation(changed(advantages=np.ones(3, np.float32))), CONFIG)
