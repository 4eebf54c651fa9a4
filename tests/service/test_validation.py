from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.service.validation import check_adam, check_lora, check_loss, check_sampling, check_ttl
from tuft.types import AdamParams, BaseModelInfo, Datum, LoraSpec, SamplingParams

MODEL = BaseModelInfo("tiny", (), "LlamaForCausalLM", 100, 16, 1000, "float32", (2,), "/tmp", {})
LIMITS = LimitsSection()


def datum(tokens: list[int], **inputs: list[float] | list[int]) -> Datum:
    arrays = {
        name: np.asarray(values, dtype=np.int64 if name == "target_tokens" else np.float32)
        for name, values in inputs.items()
    }
    return Datum(np.asarray(tokens, dtype=np.int64), arrays)


GOOD = datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0, 1, 1])


def refused(*data: Datum, loss_fn: str = "cross_entropy", config: dict[str, float | str] | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_loss(data, loss_fn, config or {}, MODEL)
    return str(caught.value)


def test_good_data_passes() -> None:
    check_loss([GOOD, datum([5], target_tokens=[6])], "cross_entropy", {}, MODEL)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (datum([1, 100], target_tokens=[1, 2]), r"data[1].model_input[1]: got 100; token ids of tiny are 0 to 99"),
        (datum([1, -1], target_tokens=[1, 2]), r"data[1].model_input[1]: got -1; token ids of tiny are 0 to 99"),
        (datum([1], target_tokens=[100]), "data[1].loss_fn_inputs.target_tokens[0]: got 100; token ids"),
        (datum([1, 2], target_tokens=[1]), "target_tokens: got 'shape [1]'; must be [2], one for each input token"),
        (datum([1], target_tokens=[1], weights=[1, 1]), "weights: got 'shape [2]'; must be [1]"),
        (datum([1], target_tokens=[1], weights=[float("nan")]), "weights[0]: got nan; must be a finite number"),
        (datum([1], target_tokens=[1], weights=[float("inf")]), "weights[0]: got inf; must be a finite number"),
        (datum([1], weights=[1]), "data[1].loss_fn_inputs: got ['weights']; cross_entropy needs target_tokens"),
        (datum([1], target_tokens=[1], mask=[1]), "loss_fn_inputs.mask: got 'mask'; known inputs are advantages"),
        (datum([], target_tokens=[]), "data[1].model_input: got '0 tokens'; must be 1 to 16 tokens"),
        (datum([1] * 17, target_tokens=[1] * 17), "got '17 tokens'; must be 1 to 16 tokens, the context of tiny"),
    ],
)
def test_bad_data_is_named_by_datum_field_value_and_range(bad: Datum, message: str) -> None:
    assert message in refused(GOOD, bad)


def test_fractional_token_ids_are_refused() -> None:
    bad = Datum(np.asarray([1]), {"target_tokens": np.asarray([1.5], dtype=np.float32)})
    assert "must be integers" in refused(bad)


def test_an_unknown_loss_lists_the_known_ones() -> None:
    assert refused(GOOD, loss_fn="hinge") == "loss_fn: got 'hinge'; this server computes cross_entropy"


def test_an_unknown_option_of_a_loss_is_refused() -> None:
    assert "cross_entropy takes no option at all" in refused(GOOD, config={"beta": 1.0})


def test_no_data_is_refused() -> None:
    assert "at least one datum" in refused()


def test_inputs_of_other_losses_may_ride_along() -> None:
    check_loss([datum([1], target_tokens=[2], advantages=[1], logprobs=[-1])], "cross_entropy", {}, MODEL)


@pytest.mark.parametrize("rank", [0, -1, 257, 10**9])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(InvalidInput, match=rf"lora_config.rank: got {rank}; must be 1 to 256"):
        check_lora(LoraSpec(rank=rank), LIMITS)


def test_an_adapter_without_layers_is_refused() -> None:
    with pytest.raises(InvalidInput, match="train_attn, train_mlp, train_unembed"):
        check_lora(LoraSpec(train_attn=False, train_mlp=False, train_unembed=False), LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1.0},
        {"beta1": 1.0},
        {"eps": -1e-9},
        {"grad_clip_norm": -1.0},
    ],
)
def test_bad_optimizer_parameters_are_named(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(InvalidInput, match=f"adam_params.{name}"):
        check_adam(replace(AdamParams(), **change))


@pytest.mark.parametrize("ttl_seconds", [0, 3599, 10**12])
def test_a_ttl_out_of_range_is_refused(ttl_seconds: int) -> None:
    with pytest.raises(InvalidInput, match="ttl_seconds"):
        check_ttl(ttl_seconds)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"stop": (100,)}, "stop"),
    ],
)
def test_bad_sampling_parameters_are_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput, match=f"sampling_params.{field}"):
        check_sampling([1], SamplingParams(**change), 1, 0, MODEL, LIMITS)  # type: ignore[arg-type]


def test_a_prompt_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"prompt\[1\]: got 100"):
        check_sampling([1, 100], SamplingParams(), 1, 0, MODEL, LIMITS)
