"""What a base model will need of its device's memory: told at start, so that nobody learns it when it runs out."""

from __future__ import annotations

from tuft.engine.base import EngineSettings
from tuft.models.architecture import DecoderConfig
from tuft.models.lora import LoraLayout
from tuft.types import LoraSpec, MemoryNeed

_EXAMPLE_RANK = 32
_BYTES_PER_PARAMETER = 16  # of an adapter: the weight, its gradient and two moments, float32 each


def memory_plan(
    config: DecoderConfig, settings: EngineSettings, item_bytes: int, is_packed: bool
) -> tuple[MemoryNeed, ...]:
    """``item_bytes``: of the compute dtype. ``is_packed``: whether decoding keeps linear weights twice."""
    weights = config.num_parameters * item_bytes
    plan = [MemoryNeed("base weights", weights)]
    if is_packed:
        linears = sum(rows * columns for rows, columns in config.linear_shapes().values())
        plan.append(MemoryNeed("the same as decoding reads them, from the first sample on", linears * item_bytes))
    plan.append(
        MemoryNeed(
            f"a training pass of {settings.micro_batch_tokens} tokens",
            settings.micro_batch_tokens * config.num_layers * _kept_bytes_per_row(config, item_bytes),
        )
    )
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * item_bytes
    tokens = settings.kv_cache_tokens
    plan.append(MemoryNeed(f"up to {tokens} tokens of samples at once", tokens * per_token))
    layout = LoraLayout(config.linear_shapes(), LoraSpec(rank=_EXAMPLE_RANK))
    plan.append(MemoryNeed(f"each run of rank {_EXAMPLE_RANK}", layout.num_parameters * _BYTES_PER_PARAMETER))
    return tuple(plan)


def _kept_bytes_per_row(config: DecoderConfig, item_bytes: int) -> int:
    """Of one layer, for the backward: two residuals in float32; in the compute dtype the inputs of the linears, and
    queries, keys, values, gate and up."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inputs = 2 * config.hidden_size + queries + config.intermediate_size
    outputs = queries + 2 * keys + 2 * config.intermediate_size
    return 2 * 4 * config.hidden_size + item_bytes * (inputs + outputs)
