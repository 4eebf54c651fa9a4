from __future__ import annotations

import pytest

from tuft.footprint import adapter_parameters, checkpoint_bytes, resident_bytes
from tuft.models.lora import LoraLayout
from tuft.types import LoraSpec

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.self_attn.v_proj": (16, 32),
    "model.layers.0.self_attn.o_proj": (32, 64),
    "model.layers.0.mlp.gate_proj": (96, 32),
    "model.layers.0.mlp.up_proj": (96, 32),
    "model.layers.0.mlp.down_proj": (32, 96),
    "lm_head": (500, 32),
}


@pytest.mark.parametrize(
    "parts", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_the_size_is_what_the_engine_lays_out(parts: tuple[bool, bool, bool]) -> None:
    spec = LoraSpec(4, None, *parts)
    assert adapter_parameters(SHAPES, spec) == LoraLayout(SHAPES, spec).num_parameters
    assert resident_bytes(SHAPES, spec, "adamw") == 16 * adapter_parameters(SHAPES, spec)
    assert resident_bytes(SHAPES, spec, "dimuon") == 12 * adapter_parameters(SHAPES, spec)


def test_a_checkpoint_with_the_optimizer_is_predicted_four_times_as_large() -> None:
    spec = LoraSpec(4)
    weights = checkpoint_bytes(SHAPES, spec, "adamw", with_optimizer=False)
    everything = checkpoint_bytes(SHAPES, spec, "adamw", with_optimizer=True)
    numbers = 4 * adapter_parameters(SHAPES, spec)
    assert numbers < weights
    assert 4 * numbers < everything
