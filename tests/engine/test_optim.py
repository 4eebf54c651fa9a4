"""AdamW against torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.engine.reference import CPU
from tuft.engine.optim import optim_step
from tuft.errors import InvalidInput, UserError
from tuft.models.lora import Adapter
from tuft.types import AdamParams, LoraSpec

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


def new_adapter() -> Adapter:
    return Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU)


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
    for step in range(10):
        gradients_P = torch.randn(len(expected), generator=generator)
        adapter.gradients_P.add_(gradients_P)
        expected.grad = gradients_P
        norm = torch.nn.utils.get_total_norm([gradients_P])
        if grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([expected], grad_clip_norm)
        optimizer.step()
        metrics = optim_step(adapter, params).metrics
        assert metrics == {
            "grad_norm:mean": pytest.approx(float(norm), rel=1e-6),
            "learning_rate:mean": 0.01,
            "step:max": step + 1,
        }
    torch.testing.assert_close(adapter.params_P, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not adapter.gradients_P.any()


def test_the_norm_of_millions_of_gradients_is_exact() -> None:
    shapes = {name: (size[0] * 64, size[1] * 64) for name, size in SHAPES.items()}
    adapter = Adapter.initialised(shapes, LoraSpec(rank=64, seed=0), CPU)
    adapter.gradients_P.normal_(generator=torch.Generator().manual_seed(0))
    expected = float(adapter.gradients_P.double().norm())
    assert optim_step(adapter, AdamParams()).metrics["grad_norm:mean"] == pytest.approx(expected, rel=1e-6)


def test_a_step_without_gradients_only_decays_weights() -> None:
    adapter = new_adapter()
    before_P = adapter.params_P.clone()
    result = optim_step(adapter, AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert result.metrics["grad_norm:mean"] == 0
    torch.testing.assert_close(adapter.params_P, before_P * 0.95)


def test_the_views_that_decoders_use_follow_a_step() -> None:
    adapter = new_adapter()
    before = adapter.views(torch.bfloat16)["lm_head"].Bs_Nr[0].clone()
    adapter.gradients_P.fill_(1.0)
    optim_step(adapter, AdamParams(learning_rate=0.1))
    assert not torch.equal(adapter.views(torch.bfloat16)["lm_head"].Bs_Nr[0], before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing_and_do_not_stay(bad: float) -> None:
    adapter = new_adapter()
    before_P = adapter.params_P.clone()
    adapter.gradients_P[5] = bad
    with pytest.raises(UserError, match="gradients"):
        optim_step(adapter, AdamParams())
    assert torch.equal(adapter.params_P, before_P)
    assert not adapter.exp_avg_P.any()
    assert adapter.step == 0
    assert optim_step(adapter, AdamParams()).metrics["step:max"] == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", math.nan), ("eps", -1.0), ("beta1", 1.0), ("beta2", 2.0), ("grad_clip_norm", -1.0)],
)
def test_impossible_parameters_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"adam_params.{option}"):
        optim_step(new_adapter(), replace(AdamParams(), **{option: value}))
