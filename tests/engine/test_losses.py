"""The losses' formulas against their definitions in float64, through the whole model too, and beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.policy import CONFIGS, Expected, expected, policy_data, reduced
from tests.engine.reference import random_adapter_state, random_data, relative_error
from tests.engine.test_packing import tree
from tests.engine.test_trainer import (
    cross_entropy,
    gradients_of,
    in_parts,
    load_adapter,
    run_all,
    run_one,
    tiny_decoder,
)
from tuft.engine.base import RunLoss
from tuft.engine.losses import LOSSES, LossRecord, terms_and_gradient
from tuft.engine.trainer import Trainer
from tuft.losses import LOSS_SIGNATURES
from tuft.models.decoder import Decoder, Precision
from tuft.models.lora import Adapter
from tuft.types import Datum, LoraSpec, LossResult

LENGTHS = (30, 9, 17, 40, 2, 17, 33)
EVERY_LOSS = pytest.mark.parametrize("loss_fn", CONFIGS)


def test_every_announced_loss_is_here_and_is_tested() -> None:
    assert LOSSES.keys() == LOSS_SIGNATURES.keys()
    assert LOSSES.keys() - CONFIGS.keys() <= {"stable_reinforce"}


def test_cross_entropy_is_minus_the_weighted_sum_of_logprobs() -> None:
    logprobs_M, weights_M = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 0.0, -2.0])
    terms, gradient_M = terms_and_gradient(LOSSES["cross_entropy"], LossRecord(logprobs_M, {"weights": weights_M}))
    assert terms.loss_M.tolist() == [0.5, 0.0, -6.0]
    assert gradient_M.tolist() == [-0.5, 0.0, 2.0]
    assert not logprobs_M.requires_grad


def new_adapter(decoder: Decoder) -> Adapter:
    return load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))


def data_for(loss_fn: str, decoder: Decoder, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Datum, ...]:
    if loss_fn == "cross_entropy":
        return random_data(decoder.config.vocab_size, lengths, seed)
    targets = cross_entropy("a", policy_data(decoder.config.vocab_size, lengths, seed=seed), backward=False)
    logprobs = run_one(Trainer(decoder, 4096), targets, new_adapter(decoder)).logprobs
    return policy_data(decoder.config.vocab_size, lengths, logprobs, seed)


def operation(loss_fn: str, data: tuple[Datum, ...], adapter_id: str = "a", backward: bool = True) -> RunLoss:
    return RunLoss(adapter_id, data, loss_fn, tuple(CONFIGS[loss_fn].items()), backward)


def expectations(result: LossResult, of: RunLoss) -> list[Expected]:
    config: Mapping[str, Any] = dict(of.loss_fn_config)
    return [expected(of.loss_fn, p, datum, config) for p, datum in zip(result.logprobs, of.data, strict=True)]


def linear(adapter_id: str, of: RunLoss, expectations: list[Expected]) -> RunLoss:
    """cross_entropy whose weights are minus the derivatives: the same gradient of the model."""
    data = []
    for datum, found in zip(of.data, expectations, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"]
        weights = -np.array(found.gradient, dtype=np.float32).reshape(targets.shape)
        data.append(replace(datum, loss_fn_inputs={"target_tokens": targets, "weights": weights}))
    return cross_entropy(adapter_id, tuple(data))


@EVERY_LOSS
@pytest.mark.parametrize("max_rows", [48, 4096])
def test_loss_metrics_and_gradients_are_those_of_the_definition(loss_fn: str, max_rows: int) -> None:
    decoder = tiny_decoder("float32")
    adapter, linearised = new_adapter(decoder), new_adapter(decoder)
    of = operation(loss_fn, data_for(loss_fn, decoder))
    result = run_one(Trainer(decoder, max_rows), of, adapter)
    found = expectations(result, of)
    assert result.metrics == pytest.approx(reduced(found), rel=1e-4, abs=1e-5)
    if "clip_fraction:mean" in result.metrics:
        assert 0.1 < result.metrics["clip_fraction:mean"] < 0.9
    run_one(Trainer(decoder, max_rows), linear("a", of, found), linearised)
    assert relative_error(gradients_of(adapter).numpy(), gradients_of(linearised).numpy()) < 1e-5


@EVERY_LOSS
def test_gradients_are_finite_differences_of_the_loss_through_the_whole_model(loss_fn: str) -> None:
    """Along the gradient itself. What a formula does not differentiate (the sg of cispo and gspo) is held fixed by
    differentiating the loss that is linear in p and has the definition's derivatives."""
    decoder = tiny_decoder("float32")
    trainer, adapter, of = Trainer(decoder, 4096), new_adapter(decoder), operation(loss_fn, data_for(loss_fn, decoder))
    result = run_one(trainer, of, adapter)
    gradient_P = gradients_of(adapter).double()
    measured = linear("a", of, expectations(result, of)) if loss_fn in ("cispo", "gspo") else of
    step, losses = 1e-3, []
    for sign in (1, -1):
        moved = new_adapter(decoder)
        moved.params_P.add_((sign * step * gradient_P / gradient_P.norm()).float())
        losses.append(run_one(trainer, replace(measured, backward=False), moved).metrics["loss:sum"])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient_P.norm()), rel=1e-2)


@EVERY_LOSS
def test_a_forward_reports_the_same_and_leaves_no_gradient(loss_fn: str) -> None:
    decoder = tiny_decoder("float32")
    data, trainer, adapter = data_for(loss_fn, decoder), Trainer(decoder, 48), new_adapter(decoder)
    forward = run_one(trainer, operation(loss_fn, data, backward=False), adapter)
    assert adapter.gradients_P is None
    backward = run_one(trainer, operation(loss_fn, data), adapter)
    assert forward.metrics == backward.metrics
    assert all(np.array_equal(a, b) for a, b in zip(forward.logprobs, backward.logprobs, strict=True))


@EVERY_LOSS
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_mixed_losses_in_one_pass_are_bit_equal_to_each_alone(loss_fn: str, precision: Precision) -> None:
    decoder, trainer = tiny_decoder(precision), Trainer(tiny_decoder(precision), 512)
    operations = [
        operation(name, data_for(name, decoder, (3, 50, 1, 20), seed), name, backward=name == loss_fn or seed % 2 == 0)
        for seed, name in enumerate(CONFIGS)
    ]
    fused = {name: new_adapter(decoder) for name in CONFIGS}
    results = dict(zip(CONFIGS, run_all(trainer, operations, fused), strict=True))
    alone = new_adapter(decoder)
    wanted = run_one(trainer, operations[list(CONFIGS).index(loss_fn)], alone)
    result = results[loss_fn]
    assert isinstance(result, LossResult)
    assert result.metrics == wanted.metrics
    assert all(np.array_equal(a, b) for a, b in zip(result.logprobs, wanted.logprobs, strict=True))
    assert torch.equal(gradients_of(fused[loss_fn]), gradients_of(alone))


def shared_beginnings(decoder: Decoder) -> tuple[Datum, ...]:
    """Answers to two prompts, in turns."""
    groups = [tree([(0, 60), (50, 20), (50, 30)], seed) for seed in range(2)]
    data = [datum for answers in zip(*groups, strict=True) for datum in answers]
    policy = policy_data(decoder.config.vocab_size, [datum.num_tokens for datum in data])
    return tuple(
        replace(datum, loss_fn_inputs={**of.loss_fn_inputs, "target_tokens": datum.loss_fn_inputs["target_tokens"]})
        for datum, of in zip(data, policy, strict=True)
    )


@pytest.mark.parametrize("loss_fn", ["ppo", "gspo"])
def test_a_sequences_ratio_is_its_own_also_where_rows_are_shared(loss_fn: str) -> None:
    decoder = tiny_decoder("float32")
    adapter, one_by_one = new_adapter(decoder), new_adapter(decoder)
    of = operation(loss_fn, shared_beginnings(decoder))
    assert len(in_parts(of, 1000)) == 1
    result = run_one(Trainer(decoder, 1000), of, adapter)
    assert result.metrics == pytest.approx(reduced(expectations(result, of)), rel=1e-4, abs=1e-5)
    for datum in of.data:
        run_one(Trainer(decoder, 1000), replace(of, data=(datum,)), one_by_one)
    assert relative_error(gradients_of(adapter).numpy(), gradients_of(one_by_one).numpy()) < 1e-5


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo"])
def test_thresholds_of_single_tokens_hold_instead_of_the_operations(loss_fn: str) -> None:
    decoder, rng = tiny_decoder("float32"), np.random.default_rng(7)
    data = list(data_for(loss_fn, decoder))
    for index in (0, 3):  # of some data only; a low one for this, a high one for that
        name = "clip_low_threshold" if index else "clip_high_threshold"
        around = 0.8 if index else 1.1
        own = {name: rng.uniform(around - 0.1, around + 0.1, data[index].num_tokens).astype(np.float32)}
        data[index] = replace(data[index], loss_fn_inputs={**data[index].loss_fn_inputs, **own})
    of = operation(loss_fn, tuple(data))
    adapter, linearised = new_adapter(decoder), new_adapter(decoder)
    result = run_one(Trainer(decoder, 48), of, adapter)
    found = expectations(result, of)
    assert result.metrics == pytest.approx(reduced(found), rel=1e-4, abs=1e-5)
    run_one(Trainer(decoder, 48), linear("a", of, found), linearised)
    assert relative_error(gradients_of(adapter).numpy(), gradients_of(linearised).numpy()) < 1e-5


def test_a_mask_says_whose_ratio_is_the_sequences() -> None:
    decoder = tiny_decoder("float32")
    data = list(data_for("gspo", decoder))
    mask_T = (np.arange(30) % 3 == 1).astype(np.float32) * 2
    data[0] = replace(data[0], loss_fn_inputs={**data[0].loss_fn_inputs, "sequence_ratio_mask": mask_T})
    of = operation("gspo", tuple(data))
    result = run_one(Trainer(decoder, 48), of, new_adapter(decoder))
    assert result.metrics == pytest.approx(reduced(expectations(result, of)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss_fn", [name for name in CONFIGS if name != "cross_entropy"])
def test_prompts_do_not_dilute_the_metrics(loss_fn: str) -> None:
    """The same sampled tokens, with their prompt and without."""
    decoder = tiny_decoder("float32")
    (datum,) = data_for(loss_fn, decoder, (30,))
    p_T = run_one(Trainer(decoder, 48), operation(loss_fn, (datum,)), new_adapter(decoder)).logprobs[0]
    record = {}
    for kind, first in (("bare", 10), ("whole", 0)):
        inputs = {name: torch.from_numpy(array[first:].copy()) for name, array in datum.loss_fn_inputs.items()}
        options = {name: torch.full((30 - first,), value) for name, value in CONFIGS[loss_fn].items()}
        record[kind] = LossRecord(torch.from_numpy(p_T[first:].copy()), {**inputs, **options})
    metrics = {kind: LOSSES[loss_fn].terms(one).metrics() for kind, one in record.items()}
    for name, values in metrics["bare"].items():
        assert torch.equal(values, metrics["whole"][name]), name
        assert len(values) in (1, 20)


def test_data_without_anything_sampled_have_a_loss_and_no_metrics() -> None:
    decoder = tiny_decoder("float32")
    (datum,) = data_for("ppo", decoder, (12,))
    zeros = {name: np.zeros(12, np.float32) for name in ("logprobs", "advantages")}
    data = (replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, **zeros}),)
    for loss_fn in ("importance_sampling", "ppo", "cispo", "gspo"):
        metrics = run_one(Trainer(decoder, 48), operation(loss_fn, data), new_adapter(decoder)).metrics
        assert metrics.pop("sequence_ratio:mean", 1.0) == 1.0
        assert metrics == {"loss:sum": 0.0}


def test_a_far_off_token_without_an_advantage_does_no_harm() -> None:
    """exp(p - q) overflows there, and infinity times 0 is no number."""
    decoder = tiny_decoder("float32")
    (datum,) = data_for("ppo", decoder, (12,))
    q_T, advantages_T = datum.loss_fn_inputs["logprobs"].copy(), datum.loss_fn_inputs["advantages"].copy()
    q_T[2], advantages_T[2] = -99999.0, 0.0
    data = (replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "logprobs": q_T, "advantages": advantages_T}),)
    for loss_fn in ("importance_sampling", "ppo", "cispo", "gspo"):
        adapter = new_adapter(decoder)
        if loss_fn == "gspo":  # not of the sequence's ratio
            mask_T = (advantages_T != 0).astype(np.float32)
            data = (replace(data[0], loss_fn_inputs={**data[0].loss_fn_inputs, "sequence_ratio_mask": mask_T}),)
        result = run_one(Trainer(decoder, 48), operation(loss_fn, data), adapter)
        assert np.isfinite(result.metrics["loss:sum"])
        assert gradients_of(adapter).any()
