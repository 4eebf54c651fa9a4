"""What is refused before it is queued and before it enters a shared pass, and how it is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tuft.errors import InvalidInput
from tuft.losses import LOSS_INPUTS, LOSS_SIGNATURES, check_loss
from tuft.types import BaseModelInfo, Datum

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"
MODEL = BaseModelInfo("tiny", (), "LlamaForCausalLM", 100, 16, 1000, "float32", (2,), "/tmp", {})


def datum(tokens: list[int], **inputs: object) -> Datum:
    arrays = {
        name: np.asarray(values, dtype=np.int64 if name == "target_tokens" else np.float32)
        for name, values in inputs.items()
    }
    return Datum(np.asarray(tokens, dtype=np.int64), arrays)


GOOD = datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0, 1, 1])
SOFT = datum([1, 2], target_tokens=[[2, 3, 4], [5, 0, 0]], weights=[[0.5, 0.25, 0.25], [1, 0, 0]])
POLICY = datum([1, 2, 3], target_tokens=[2, 3, 4], logprobs=[0, -1, -2], advantages=[0, 1, -1])


def changed(good: Datum, **inputs: object) -> Datum:
    added = {name: np.asarray(values) for name, values in inputs.items()}
    return replace(good, loss_fn_inputs={**good.loss_fn_inputs, **added})


def refused(*data: Datum, loss_fn: str = "cross_entropy", config: dict[str, float | str] | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_loss(data, loss_fn, config or {}, MODEL)
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss_fn", "data", "config"),
    [
        ("cross_entropy", (GOOD, SOFT, datum([5], target_tokens=[6]), datum([5], target_tokens=[[6]])), {}),
        ("importance_sampling", (POLICY,), {}),
        ("ppo", (POLICY, changed(POLICY, clip_low_threshold=[0.0, 0.5, 1.2])), {"clip_high_threshold": 1.5}),
        ("cispo", (POLICY,), {"clip_low_threshold": -1, "clip_high_threshold": 0}),
        ("dro", (POLICY,), {"beta": 0.0}),
        ("gspo", (POLICY, changed(POLICY, sequence_ratio_mask=[0.0, 1.0, 1.0])), {"clip_low_threshold": 0.9997}),
    ],
)
def test_good_data_pass(loss_fn: str, data: tuple[Datum, ...], config: dict[str, float | str]) -> None:
    check_loss(data, loss_fn, config, MODEL)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (datum([1, 100], target_tokens=[1, 2]), r"data[1].model_input[1]: got 100; token ids of tiny are 0 to 99"),
        (datum([1, -1], target_tokens=[1, 2]), r"data[1].model_input[1]: got -1; token ids of tiny are 0 to 99"),
        (datum([], target_tokens=[]), "data[1].model_input: got '0 tokens'; must be 1 to 16 tokens"),
        (datum([1] * 17, target_tokens=[1] * 17), "got '17 tokens'; must be 1 to 16 tokens, the context of tiny"),
        (replace(GOOD, tokens_T=np.array([1.0, 2.0, 3.0])), "data[1].model_input: got 'float64'; must be integers"),
        (datum([1], target_tokens=[100]), "data[1].loss_fn_inputs.target_tokens[0]: got 100; token ids"),
        (changed(SOFT, target_tokens=[[1, 2, 3], [4, -1, 0]]), "target_tokens[1][1]: got -1; token ids of tiny are"),
        (changed(GOOD, target_tokens=[1.5, 2, 3]), "target_tokens: got 'float64'; must be integers"),
        (datum([1, 2], target_tokens=[1]), "target_tokens: got 'shape [1]'; must be [2] or [2, K], a row for each"),
        (datum([1, 2], target_tokens=[[1, 2]]), "target_tokens: got 'shape [1, 2]'; must be [2] or [2, K]"),
        (datum([1], target_tokens=[[[1]]]), "target_tokens: got 'shape [1, 1, 1]'; must be [1] or [1, K]"),
        (datum([1], target_tokens=[[]]), "target_tokens: got 'shape [1, 0]'; must be [1] or [1, K]"),
        (datum([1], target_tokens=[[7] * 101]), "'shape [1, 101]'; must have at most 100 columns, the vocabulary of"),
        (datum([1], target_tokens=[1], weights=[1, 1]), "weights: got 'shape [2]'; must be [1], that of target_tokens"),
        (changed(SOFT, weights=[1.0, 1.0]), "weights: got 'shape [2]'; must be [2, 3], that of target_tokens"),
        (datum([1], target_tokens=[1], weights=[float("nan")]), "weights[0]: got nan; must be a finite number"),
        (datum([1], target_tokens=[1], weights=[float("inf")]), "weights[0]: got inf; must be a finite number"),
        (changed(GOOD, weights=[1, 1, 1e39]), "weights[2]: got 1e+39; must be a finite number, of float32's range"),
        (changed(SOFT, weights=[[1, 1, 1], [1, 1, np.nan]]), "data[1].loss_fn_inputs.weights[1][2]: got nan; must be"),
        (changed(GOOD, weights=["a", "b", "c"]), "data[1].loss_fn_inputs.weights: got '<U1'; must be numbers"),
        (datum([1], weights=[1]), "data[1].loss_fn_inputs: got ['weights']; cross_entropy needs target_tokens"),
        (datum([1], target_tokens=[1], mask=[1]), "loss_fn_inputs.mask: got 'mask'; known inputs are advantages"),
    ],
)
def test_bad_data_is_named_by_datum_field_value_and_range(bad: Datum, message: str) -> None:
    assert message in refused(GOOD, bad)


def test_data_of_a_part_are_named_by_their_place_in_the_operation() -> None:
    with pytest.raises(InvalidInput, match=r"data\[7\].model_input\[0\]"):
        check_loss([GOOD, datum([100], target_tokens=[1])], "cross_entropy", {}, MODEL, [3, 7])


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        (
            "hinge",
            {},
            "loss_fn: got 'hinge'; this server computes cispo, cross_entropy, custom, dro, gspo, importance_",
        ),
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config: got 'beta'; cross_entropy takes no option at all"),
        ("ppo", {"clip": 0.2}, "got 'clip'; ppo takes clip_high_threshold, clip_low_threshold"),
        ("ppo", {"clip_low_threshold": "0.8"}, "loss_fn_config.clip_low_threshold: got '0.8'; must be a finite number"),
        ("ppo", {"clip_low_threshold": float("nan")}, "loss_fn_config.clip_low_threshold: got nan; must be a finite"),
        ("ppo", {"clip_high_threshold": 10**400}, "loss_fn_config.clip_high_threshold: got 1000"),
        ("ppo", {"clip_low_threshold": 1.3}, "clip_low_threshold: got 1.3; must be at most clip_high_threshold"),
        ("cispo", {"clip_high_threshold": -1.0}, "clip_low_threshold: got 0.0; must be at most clip_high_threshold"),
        ("dro", {"beta": -0.1}, "loss_fn_config.beta: got -0.1; must not be negative"),
        ("gspo", {"clip_low_threshold": 3e-4, "clip_high_threshold": 4e-4}, "got 0.0004; bounds the ratio: must be at"),
        ("gspo", {"clip_low_threshold": 1.1}, "clip_low_threshold: got 1.1; bounds the ratio: must be at most 1"),
    ],
)
def test_a_bad_option_of_a_loss_is_named_with_what_is_allowed(
    loss_fn: str, config: dict[str, float | str], message: str
) -> None:
    assert message in refused(POLICY, loss_fn=loss_fn, config=config)


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "message"),
    [
        ("ppo", {"clip_low_threshold": [0.5, 1.5, 0.5]}, "inputs.clip_low_threshold[1]: got 1.5; must be at most clip"),
        ("ppo", {"clip_high_threshold": [0.9, 0.5, 2]}, "clip_low_threshold: got 0.8; must be at most clip_high"),
        ("gspo", {"clip_high_threshold": [1.1, 0.9, 2]}, "inputs.clip_high_threshold[1]: got 0.9; bounds the ratio"),
        ("gspo", {"sequence_ratio_mask": [0, 0, 0]}, "sequence_ratio_mask: got 'zeros only'; must mark the sampled"),
        ("ppo", {"clip_low_threshold": [0.5]}, "clip_low_threshold: got 'shape [1]'; must be [3], that of target_tok"),
        ("dro", {"beta": [0.1, 0.1, 0.1]}, "loss_fn_inputs.beta: got 'beta'; known inputs are"),
    ],
)
def test_bad_inputs_of_single_tokens_are_named(loss_fn: str, inputs: dict[str, list[float]], message: str) -> None:
    assert message in refused(changed(POLICY, **inputs), loss_fn=loss_fn)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
@pytest.mark.parametrize("name", ["logprobs", "advantages"])
def test_a_policys_loss_needs_what_was_sampled(loss_fn: str, name: str) -> None:
    inputs = {key: array for key, array in POLICY.loss_fn_inputs.items() if key != name}
    assert f"{loss_fn} needs {name}" in refused(replace(POLICY, loss_fn_inputs=inputs), loss_fn=loss_fn)


def test_no_data_is_refused() -> None:
    assert "at least one datum" in refused()


def test_inputs_that_only_another_loss_reads_may_ride_along() -> None:
    check_loss([datum([1], target_tokens=[2], advantages=[1], logprobs=[-1])], "cross_entropy", {}, MODEL)
    check_loss([changed(POLICY, weights=[[1, 2], [3, float("nan")]])], "ppo", {}, MODEL)


def test_the_page_of_losses_lists_each_with_its_inputs_and_defaults() -> None:
    rows = {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert rows.keys() == {"loss_fn", "custom", *LOSS_SIGNATURES}
    for loss_fn, signature in LOSS_SIGNATURES.items():
        for name, default in signature.config.items():
            assert f"`{name}` {default}" in rows[loss_fn]
        for name in {*signature.inputs, *signature.optional} & LOSS_INPUTS:
            assert f"`{name}`" in rows[loss_fn] or loss_fn == "stable_reinforce"
