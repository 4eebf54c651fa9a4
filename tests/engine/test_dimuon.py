"""Dimuon against the same formulas in float64 with an exact singular value decomposition, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.engine.reference import CPU
from tests.engine.test_optim import SHAPES
from tuft.engine.dimuon import directions
from tuft.engine.optim import optim_steps
from tuft.errors import InvalidInput
from tuft.models.lora import Adapter
from tuft.types import AdamParams, DimuonParams, LoraSpec, OptimizerParams, OptimStepResult

Float64Array = npt.NDArray[np.float64]

PARAMS = DimuonParams(learning_rate=0.02)


def new_adapter(rank: int = 4, *, moving: bool = True) -> Adapter:
    """If ``moving``, B is not zero as it is at first."""
    adapter = Adapter.initialised(SHAPES, LoraSpec(rank=rank, seed=0), CPU, "dimuon")
    if moving:
        adapter.params_P.normal_(generator=torch.Generator().manual_seed(rank))
    return adapter


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(adapter: Adapter, params: OptimizerParams, gradients_P: torch.Tensor | None = None) -> Mapping[str, float]:
    if gradients_P is not None:
        adapter.add_gradients(gradients_P.clone())
    (result,) = optim_steps([(adapter, params)])
    assert isinstance(result, OptimStepResult), result
    return result.metrics


def changes(adapter: Adapter, params: DimuonParams, gradients_P: torch.Tensor) -> dict[str, Float64Array]:
    """What a step adds to each matrix."""
    before = adapter.layout.export(adapter.params_P)
    step(adapter, params, gradients_P)
    after = adapter.layout.export(adapter.params_P)
    return {name: after[name].astype(np.float64) - before[name] for name in before}


def exact_direction(momentum: Float64Array, damping: float) -> Float64Array:
    """``momentum`` with the rank first or last: the formulas are the same for a transposed matrix."""
    square = np.mean(momentum**2)
    rows = np.mean(momentum**2, axis=1, keepdims=True) / square + damping
    columns = np.mean(momentum**2, axis=0, keepdims=True) / square + damping
    left, _, right = np.linalg.svd(momentum / (rows * columns) ** 0.25, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("grad_clip_norm", [-1.0, 0.5])
def test_three_steps_are_those_of_the_formulas_in_float64(rank: int, grad_clip_norm: float) -> None:
    params = DimuonParams(0.05, grad_clip_norm, beta1=0.7, damping=0.01, rank_lr_correction_exponent=0.3)
    adapter = new_adapter(rank)
    weights = {name: array.astype(np.float64) for name, array in adapter.layout.export(adapter.params_P).items()}
    momenta = {name: np.zeros_like(array) for name, array in weights.items()}
    for number in range(3):
        gradients_P = random(len(adapter.params_P), seed=number)
        metrics = step(adapter, params, gradients_P)
        norm = float(gradients_P.double().norm())
        assert metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-6)
        assert metrics["step:max"] == number + 1
        clipped = min(1.0, grad_clip_norm / norm) if grad_clip_norm > 0 else 1.0
        for name, gradient in adapter.layout.export(gradients_P).items():
            momenta[name] = 0.7 * momenta[name] + 0.3 * clipped * gradient
            direction = exact_direction(momenta[name], 0.01)
            weights[name] -= 0.05 * (rank / 32) ** 0.3 * direction
    for name, array in adapter.layout.export(adapter.params_P).items():
        np.testing.assert_allclose(array, weights[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("condition", [1.0, 30.0, 300.0])
def test_the_iteration_leads_to_the_exact_sign(rank: int, condition: float) -> None:
    left, _, right = np.linalg.svd(random(rank, 200).numpy().astype(np.float64), full_matrices=False)
    momentum = (left * np.geomspace(1, 1 / condition, rank)) @ right * 1e-7
    direction_Crn, effective_rank_C = directions(torch.tensor(momentum[None], dtype=torch.float32), 1e-4)
    np.testing.assert_allclose(direction_Crn[0].numpy(), exact_direction(momentum, 1e-4), atol=1e-4)
    assert float(effective_rank_C) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize(
    ("momentum_rn", "effective_rank"),
    [
        (random(8, 5), 5.0),  # higher than wide
        (random(8, 1) * random(300, seed=1), 1.0),
        (random(8, 2) @ random(2, 300, seed=1), 2.0),
        (random(8, 300) * torch.logspace(0, -20, 8)[:, None], None),  # rows that all but vanish
        (random(8, 300) * 1e-30, 8.0),
        (random(8, 300) * 1e30, 8.0),
    ],
)
def test_the_norm_of_a_direction_is_the_root_of_the_rank(
    momentum_rn: torch.Tensor, effective_rank: float | None
) -> None:
    direction_Crn, effective_rank_C = directions(momentum_rn[None], 1e-4)
    assert float(direction_Crn.norm()) == pytest.approx(math.sqrt(8), rel=1e-5)
    if effective_rank is not None:
        assert float(effective_rank_C) == pytest.approx(effective_rank, rel=1e-3)


def test_the_scale_of_gradients_does_not_matter() -> None:
    adapter, loud = new_adapter(), new_adapter()
    gradients_P = random(len(adapter.params_P))
    ours, theirs = changes(adapter, PARAMS, gradients_P), changes(loud, PARAMS, gradients_P * 1000)
    for name, change in ours.items():
        np.testing.assert_allclose(theirs[name], change, atol=1e-6)


def test_the_learning_rate_is_corrected_for_the_rank() -> None:
    for rank in (4, 16):
        for exponent, factor in ((0.0, 1.0), (0.175, (rank / 32) ** 0.175)):
            adapter = new_adapter(rank)
            params = DimuonParams(0.1, rank_lr_correction_exponent=exponent)
            for change in changes(adapter, params, random(len(adapter.params_P))).values():
                assert np.linalg.norm(change) == pytest.approx(0.1 * factor * math.sqrt(rank), rel=1e-4)


def test_a_momentum_of_zeros_moves_nothing() -> None:
    adapter = new_adapter()
    before_P = adapter.params_P.clone()
    metrics = step(adapter, PARAMS)
    assert metrics["update_norm:mean"] == metrics["effective_rank:mean"] == 0
    assert torch.equal(adapter.params_P, before_P)
    assert step(adapter, PARAMS, torch.zeros_like(before_P))["step:max"] == 2
    assert torch.equal(adapter.params_P, before_P)


def test_the_first_step_moves_every_b_and_no_a() -> None:
    adapter = new_adapter(moving=False)
    gradients_P = random(len(adapter.params_P))
    for group in adapter.layout.groups:
        for A in group.As:
            A.of(gradients_P).zero_()  # as it is while B is zero
    before_P = adapter.params_P.clone()
    metrics = step(adapter, PARAMS, gradients_P)
    moved = adapter.layout.export(adapter.params_P - before_P)
    assert np.isfinite(adapter.params_P.numpy()).all()
    assert {name for name, change in moved.items() if change.any()} == {name for name in moved if "lora_B" in name}
    total = math.sqrt(sum(float(np.linalg.norm(change)) ** 2 for change in moved.values()))
    assert metrics["update_norm:mean"] == pytest.approx(total, rel=1e-5)
    assert metrics["effective_rank:mean"] == pytest.approx(4, rel=1e-3)


def test_without_gradients_it_goes_on_along_its_momentum() -> None:
    adapter = new_adapter()
    first = changes(adapter, PARAMS, random(len(adapter.params_P)))
    second = changes(adapter, PARAMS, torch.zeros_like(adapter.params_P))
    for name, change in first.items():
        np.testing.assert_allclose(second[name], change, atol=1e-6)


def test_only_the_momentum_is_kept() -> None:
    adapter = new_adapter()
    assert adapter.moments.keys() == {"exp_avg"}
    assert adapter.num_bytes == 3.5 * adapter.params_P.nbytes
    state = adapter.state(with_optimizer=True)
    assert (state.optimizer, bool(state.exp_avg), bool(state.exp_avg_sq)) == ("dimuon", True, False)


def test_what_was_exported_goes_on_bit_equal() -> None:
    adapter = new_adapter()
    step(adapter, PARAMS, random(len(adapter.params_P)))
    adapter.add_gradients(random(len(adapter.params_P), seed=1))
    again = Adapter.from_state(SHAPES, adapter.state(with_optimizer=True), CPU, trainable=True)
    assert step(adapter, PARAMS) == step(again, PARAMS)
    assert torch.equal(adapter.params_P, again.params_P)
    assert torch.equal(adapter.moments["exp_avg"], again.moments["exp_avg"])


def test_a_state_of_another_optimizer_is_refused() -> None:
    state = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU).state(with_optimizer=True)
    with pytest.raises(InvalidInput, match="exp_avg_sq: got 'present'; dimuon keeps no such moment"):
        Adapter.from_state(SHAPES, replace(state, optimizer="dimuon"), CPU, trainable=True)


def test_steps_of_many_runs_are_bit_equal_to_each_alone_and_fail_alone() -> None:
    """Other ranks, other parameters, both families, one that fails."""
    adam = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU)
    wanted: list[OptimizerParams] = [PARAMS, replace(PARAMS, damping=0.1), AdamParams(), AdamParams(), PARAMS]

    def adapters() -> list[Adapter]:
        made = [new_adapter(4), new_adapter(9), Adapter.from_state(SHAPES, adam.state(True), CPU, True)]
        made += [new_adapter(2), new_adapter(4)]
        for number, adapter in enumerate(made):
            adapter.add_gradients(random(len(adapter.params_P), seed=number))
        return made

    together, alone = adapters(), adapters()
    results = optim_steps(list(zip(together, wanted, strict=True)))
    expected = [optim_steps([(adapter, params)])[0] for adapter, params in zip(alone, wanted, strict=True)]
    assert isinstance(results[3], InvalidInput)
    assert together[3].gradients_P is not None
    for ours, theirs, result, other in zip(together, alone, results, expected, strict=True):
        assert torch.equal(ours.params_P, theirs.params_P)
        assert ours.step == theirs.step == int(isinstance(result, OptimStepResult))
        assert all(torch.equal(moment_P, theirs.moments[name]) for name, moment_P in ours.moments.items())
        if isinstance(result, OptimStepResult):
            assert isinstance(other, OptimStepResult)
            assert result.metrics == other.metrics


def test_matrices_of_several_chunks_are_computed_as_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = new_adapter(), new_adapter()
    gradients_P = random(len(together.params_P))
    step(together, PARAMS, gradients_P)
    monkeypatch.setattr("tuft.engine.dimuon._CHUNK_NUMBERS", 1)
    step(apart, PARAMS, gradients_P)
    torch.testing.assert_close(together.params_P, apart.params_P, rtol=0, atol=1e-6)
