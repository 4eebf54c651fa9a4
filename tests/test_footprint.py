from __future__ import annotations

import numpy as np
import pytest

from tuft.errors import InvalidInput
from tuft.footprint import (
    adapter_parameters,
    check_adapter,
    check_sequences,
    checkpoint_bytes,
    longest_sequence,
    resident_bytes,
)
from tuft.models.lora import LoraLayout
from tuft.types import BaseModelInfo, Datum, LoraSpec, MemoryShares

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


MEMORY = MemoryShares(
    pass_bytes=2_000_000, adapter_bytes=3_000_000, pass_tokens=100, row_bytes=9_000, long_row_bytes=5_000,
    fixed_bytes=100_000,
)  # fmt: skip


def sequence(num_tokens: int) -> Datum:
    tokens = np.arange(num_tokens, dtype=np.int64)
    return Datum(tokens, {"target_tokens": tokens})


def test_a_sequence_that_fits_a_pass_is_never_refused() -> None:
    check_sequences([sequence(100)], 10**9, MEMORY)


def test_the_longest_sequence_is_the_last_that_is_not_refused() -> None:
    longest = longest_sequence(MEMORY, 1000)
    assert longest * MEMORY.long_row_bytes + MEMORY.fixed_bytes + 8 * 1000 <= MEMORY.pass_bytes
    check_sequences([sequence(longest)], 1000, MEMORY)
    needed = f"{(longest + 1) * MEMORY.long_row_bytes + MEMORY.fixed_bytes + 8 * 1000:,}"
    said = f"got '{longest + 1} tokens'; needs about {needed} bytes of memory, and 2,000,000 are there for a pass"
    with pytest.raises(InvalidInput, match=rf"data\[1\]\.model_input: {said}: at most {longest} tokens"):
        check_sequences([sequence(1), sequence(longest + 1)], 1000, MEMORY)
    with pytest.raises(InvalidInput, match=r"data\[7\]\.model_input"):
        check_sequences([sequence(longest + 1)], 1000, MEMORY, numbers=[7])


def test_where_nothing_is_known_of_memory_nothing_is_refused() -> None:
    check_sequences([sequence(10**6)], 1, None)
    check_adapter(LoraSpec(4096), model(None))


def test_an_adapter_that_does_not_fit_is_refused_with_what_it_needs() -> None:
    fitting = next(rank for rank in range(1000, 0, -1) if resident_bytes(SHAPES, LoraSpec(rank), "adamw") <= 2_000_000)
    check_adapter(LoraSpec(fitting), model(MEMORY))
    needed = resident_bytes(SHAPES, LoraSpec(fitting + 1), "adamw")
    said = rf"lora_config\.rank: got {fitting + 1}; needs {needed:,} bytes of memory on m, and 2,000,000 are there"
    with pytest.raises(InvalidInput, match=said):
        check_adapter(LoraSpec(fitting + 1), model(MEMORY))


def model(memory: MemoryShares | None) -> BaseModelInfo:
    return BaseModelInfo("m", (), "llama", 500, 512, 10**5, "float32", (2,), "", SHAPES, memory=memory)
