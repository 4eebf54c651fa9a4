"""AdamW against torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from tests.engine.reference import CPU
from tuft.engine.optim import optim_steps
from tuft.errors import InvalidInput, UserError
from tuft.models.lora import Adapter
from tuft.types import AdamParams, LoraSpec, OptimStepResult

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 16), "lm_head": (48, 16)} | {
    f"model.layers.0.{name}": (16, 16)
    for name in (
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
}


def new_adapter(rank: int = 4) -> Adapter:
    return Adapter.initialised(SHAPES, LoraSpec(rank=rank, seed=0), CPU)


def step(adapter: Adapter, params: AdamParams) -> Mapping[str, float]:
    (result,) = optim_steps([(adapter, params)])
    assert isinstance(result, OptimStepResult), result
    return result.metrics


def random_gradients(adapter: Adapter, seed: int) -> torch.Tensor:
    return torch.randn(adapter.layout.num_parameters, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grad_clip_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_ten_steps_are_those_of_torch(grad_clip_norm: float, weight_decay: float, eps: float) -> None:
    params = AdamParams(learning_rate=0.01, eps=eps, weight_decay=weight_decay, grad_clip_norm=grad_clip_norm)
    adapter = new_adapter()
    expected = torch.nn.Parameter(adapter.params_P.clone())
    optimizer = torch.optim.AdamW(
        [expected], lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=eps, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        gradients_P = torch.randn(len(expected), generator=generator)
        adapter.add_gradients(gradients_P.clone())
        expected.grad = gradients_P
        norm = torch.nn.utils.get_total_norm([gradients_P])
        if grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([expected], grad_clip_norm)
        optimizer.step()
        metrics = step(adapter, params)
        assert metrics == {
            "grad_norm:mean": pytest.approx(float(norm), rel=1e-6),
            "learning_rate:mean": 0.01,
            "step:max": number + 1,
        }
    torch.testing.assert_close(adapter.params_P, expected.detach(), rtol=1e-5, atol=1e-6)
    assert adapter.gradients_P is None


def test_the_norm_of_millions_of_gradients_is_exact() -> None:
    shapes = {name: (size[0] * 64, size[1] * 64) for name, size in SHAPES.items()}
    adapter = Adapter.initialised(shapes, LoraSpec(rank=64, seed=0), CPU)
    gradients_P = random_gradients(adapter, seed=0)
    adapter.add_gradients(gradients_P)
    expected = float(gradients_P.double().norm())
    assert step(adapter, AdamParams())["grad_norm:mean"] == pytest.approx(expected, rel=1e-6)


def test_a_step_without_gradients_only_decays_weights() -> None:
    adapter = new_adapter()
    before_P = adapter.params_P.clone()
    assert step(adapter, AdamParams(learning_rate=0.1, weight_decay=0.5))["grad_norm:mean"] == 0
    torch.testing.assert_close(adapter.params_P, before_P * 0.95)


def test_the_views_that_decoders_use_follow_a_step() -> None:
    adapter = new_adapter()
    before = adapter.views(torch.bfloat16)["lm_head"].Bs_Nr[0].clone()
    adapter.add_gradients(torch.ones_like(adapter.params_P))
    step(adapter, AdamParams(learning_rate=0.1))
    assert not torch.equal(adapter.views(torch.bfloat16)["lm_head"].Bs_Nr[0], before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing_and_do_not_stay(bad: float) -> None:
    adapter = new_adapter()
    before_P = adapter.params_P.clone()
    gradients_P = random_gradients(adapter, seed=0)
    gradients_P[5] = bad
    adapter.add_gradients(gradients_P)
    (error,) = optim_steps([(adapter, AdamParams())])
    assert isinstance(error, UserError)
    assert "gradients: global norm is" in str(error)
    assert torch.equal(adapter.params_P, before_P)
    assert not adapter.moments["exp_avg"].any()
    assert adapter.step == 0
    assert step(adapter, AdamParams())["step:max"] == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", math.nan), ("eps", -1.0), ("beta1", 1.0), ("beta2", 2.0), ("grad_clip_norm", -1.0)],
)
def test_impossible_parameters_are_refused_by_name_and_leave_the_gradients(option: str, value: float) -> None:
    adapter = new_adapter()
    adapter.add_gradients(torch.ones_like(adapter.params_P))
    (error,) = optim_steps([(adapter, replace(AdamParams(), **{option: value}))])
    assert isinstance(error, InvalidInput)
    assert f"adam_params.{option}" in str(error)
    assert adapter.gradients_P is not None


def test_steps_of_many_runs_are_bit_equal_to_each_alone_and_fail_alone() -> None:
    """Other ranks, parameters that some share and some do not, different counts of steps, two that fail."""
    shared, own = AdamParams(learning_rate=0.01), AdamParams(learning_rate=0.02, grad_clip_norm=0.5, weight_decay=0.1)
    wanted = [shared, own, shared, replace(own, beta2=1.0), shared, shared]
    broken = 4

    def adapters() -> list[Adapter]:
        made = [new_adapter(rank) for rank in (4, 3, 9, 4, 4, 1)]
        step(made[0], AdamParams())
        for number, adapter in enumerate(made):
            gradients_P = random_gradients(adapter, seed=number)
            if number == broken:
                gradients_P[7] = math.inf
            if number != 5:  # the last has none
                adapter.add_gradients(gradients_P)
        return made

    together, alone = adapters(), adapters()
    results = optim_steps(list(zip(together, wanted, strict=True)))
    expected = [optim_steps([(adapter, params)])[0] for adapter, params in zip(alone, wanted, strict=True)]
    assert [type(result) for result in results] == [type(result) for result in expected]
    assert isinstance(results[3], InvalidInput)
    assert isinstance(results[broken], UserError)
    for ours, theirs, result, other in zip(together, alone, results, expected, strict=True):
        assert torch.equal(ours.params_P, theirs.params_P)
        assert all(torch.equal(ours.moments[name], theirs.moments[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert ours.step == theirs.step
        if isinstance(result, OptimStepResult):
            assert isinstance(other, OptimStepResult)
            assert result.metrics == other.metrics
