"""Adapters: layout, initial values, PEFT's names, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.reference import CPU, random_adapter_state
from tuft.errors import InvalidInput, ModelError
from tuft.models.architecture import DecoderConfig
from tuft.models.lora import Adapter
from tuft.types import AdapterState, LoraSpec

CONFIG = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
)
SHAPES = CONFIG.linear_shapes()
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def with_array(state: AdapterState, name: str, array: np.ndarray) -> AdapterState:
    return replace(state, weights={**state.weights, name: array})


def test_names_and_shapes_are_those_of_peft() -> None:
    weights = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU).state(with_optimizer=False).weights
    assert len(weights) == 2 * (7 * 2 + 1)
    assert weights[Q_A].shape == (4, 64)
    assert weights["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert weights["base_model.model.lm_head.lora_B.weight"].shape == (96, 4)


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        (LoraSpec(rank=2, train_attn=False), "self_attn"),
        (LoraSpec(rank=2, train_mlp=False), "mlp"),
        (LoraSpec(rank=2, train_unembed=False), "lm_head"),
    ],
)
def test_the_spec_chooses_the_linears(spec: LoraSpec, absent: str) -> None:
    names = Adapter.initialised(SHAPES, spec, CPU).state(with_optimizer=False).weights
    kinds = {"self_attn", "mlp", "lm_head"}
    assert {kind for kind in kinds if any(kind in name for name in names)} == kinds - {absent}


def test_an_adapter_that_trains_nothing_is_refused() -> None:
    spec = LoraSpec(rank=2, train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(InvalidInput, match="at least one"):
        Adapter.initialised(SHAPES, spec, CPU)


def test_initial_a_is_uniform_within_its_bound_and_b_is_zero() -> None:
    weights = Adapter.initialised(SHAPES, LoraSpec(rank=16, seed=3), CPU).state(with_optimizer=False).weights
    for name, array in weights.items():
        if "lora_B" in name:
            assert not array.any()
        else:
            bound = 1 / math.sqrt(array.shape[1])
            assert np.abs(array).max() <= bound
            assert array.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_seed_alone_fixes_the_initial_values() -> None:
    def params(seed: int | None) -> torch.Tensor:
        return Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=seed), CPU).params_P

    first = params(7)
    torch.manual_seed(1)
    assert torch.equal(params(7), first)
    assert not torch.equal(params(8), first)
    assert not torch.equal(params(None), params(None))


def test_fused_views_are_the_exported_matrices_one_below_the_other() -> None:
    adapter = Adapter.from_state(SHAPES, random_adapter_state(CONFIG, LoraSpec(rank=4, seed=0)), CPU, trainable=True)
    group = adapter.views(torch.float32)["1.gate_up"]
    weights = adapter.state(with_optimizer=False).weights
    prefix = "base_model.model.model.layers.1.mlp"
    expected = np.concatenate([weights[f"{prefix}.{kind}_proj.lora_A.weight"] for kind in ("gate", "up")])
    np.testing.assert_array_equal(group.A_RK.numpy(), expected)
    np.testing.assert_array_equal(group.Bs_Nr[1].numpy(), weights[f"{prefix}.up_proj.lora_B.weight"])


def test_state_survives_a_round_trip_with_its_optimizer() -> None:
    adapter = Adapter.from_state(SHAPES, random_adapter_state(CONFIG, LoraSpec(rank=4, seed=0)), CPU, trainable=True)
    adapter.gradients_P = torch.empty_like(adapter.params_P)
    for number, flat_P in enumerate((adapter.gradients_P, *adapter.moments.values())):
        flat_P.fill_(number + 0.5)
    adapter.step = 11
    again = Adapter.from_state(SHAPES, adapter.state(with_optimizer=True), CPU, trainable=True)
    for name in ("params_P", "gradients_P"):
        assert torch.equal(getattr(again, name), getattr(adapter, name)), name
    assert again.moments.keys() == adapter.moments.keys() == {"exp_avg", "exp_avg_sq"}
    assert all(torch.equal(moment_P, adapter.moments[name]) for name, moment_P in again.moments.items())
    assert again.step == 11


def test_exported_arrays_are_copies() -> None:
    adapter = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU)
    before = adapter.params_P.clone()
    for array in adapter.state(with_optimizer=True).weights.values():
        array += 1
    assert torch.equal(adapter.params_P, before)


def test_weights_without_moments_start_a_fresh_optimizer() -> None:
    state = random_adapter_state(CONFIG, LoraSpec(rank=4, seed=0))
    adapter = Adapter.from_state(SHAPES, state, CPU, trainable=True)
    assert not adapter.moments["exp_avg"].any()
    assert adapter.gradients_P is None


def test_frozen_weights_hold_no_optimizer_and_do_not_follow_their_source() -> None:
    source = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU)
    frozen = source.frozen_copy()
    before = source.params_P.clone()
    source.params_P.add_(1)
    assert torch.equal(frozen.params_P, before)
    assert frozen.moments == {}
    with pytest.raises(ModelError, match="frozen"):
        frozen.state(with_optimizer=True)


def test_bf16_views_follow_the_master_copy_once_it_is_marked() -> None:
    adapter = Adapter.initialised(SHAPES, LoraSpec(rank=4, seed=0), CPU)
    before = adapter.views(torch.bfloat16)["lm_head"].A_RK.clone()
    adapter.params_P.mul_(2)
    adapter.mark_updated()
    assert torch.equal(adapter.views(torch.bfloat16)["lm_head"].A_RK, 2 * before)
    assert torch.equal(adapter.views(torch.float32)["lm_head"].A_RK.bfloat16(), 2 * before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: with_array(s, Q_A, np.zeros((3, 64), np.float32)),
            f"weights[{Q_A}].shape: got (3, 64); must be (4",
        ),
        (lambda s: with_array(s, Q_A, np.full((4, 64), np.nan, np.float32)), f"weights[{Q_A}]: got 'NaN or infinity'"),
        (lambda s: with_array(s, "stray", np.zeros(1, np.float32)), "weights[stray]: got 'present'"),
        (lambda s: replace(s, weights={k: v for k, v in s.weights.items() if k != Q_A}), f"weights[{Q_A}]: got 'miss"),
        (lambda s: replace(s, exp_avg={Q_A: s.weights[Q_A]}), "exp_avg["),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(change: object, message: str) -> None:
    state = change(random_adapter_state(CONFIG, LoraSpec(rank=4, seed=0)))  # type: ignore[operator]
    with pytest.raises(InvalidInput) as error:
        Adapter.from_state(SHAPES, state, CPU, trainable=True)
    assert message in str(error.value)
