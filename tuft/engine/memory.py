"""What a base model will need of its device's memory: told at start, so that nobody learns it when it runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tuft.engine.base import EngineSettings
from tuft.errors import ConfigError
from tuft.models.architecture import DecoderConfig
from tuft.models.decoder import Decoder
from tuft.models.lora import LoraLayout
from tuft.types import LoraSpec, MemoryNeed

_EXAMPLE_RANK = 32
_PASS_MARGIN = 1.25  # what lives only while a layer is computed, and what the allocator cannot join
_BYTES_PER_PARAMETER = 16  # of an adapter: the weight, its gradient and AdamW's two moments, float32 each


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
            f"a training pass of {settings.micro_batch_tokens} tokens", _pass_bytes(config, settings, item_bytes)
        )
    )
    plan.append(
        MemoryNeed(
            f"up to {settings.kv_cache_tokens} tokens of samples at once", _sample_bytes(config, settings, item_bytes)
        )
    )
    layout = LoraLayout(config.linear_shapes(), LoraSpec(rank=_EXAMPLE_RANK))
    purpose = f"each run of rank {_EXAMPLE_RANK}; with dimuon a quarter less"
    plan.append(MemoryNeed(purpose, layout.num_parameters * _BYTES_PER_PARAMETER))
    return tuple(plan)


def adapter_memory(decoders: Sequence[Decoder], settings: EngineSettings) -> int | None:
    """Bytes that adapters may hold on the GPU of ``decoders``, whose weights are there; None on a CPU. Raises
    ConfigError if the rest of the plan leaves nothing."""
    device = decoders[0].device
    if device.type == "cpu":
        return None
    if settings.adapter_memory_gib is not None:
        return int(settings.adapter_memory_gib * 2**30)
    free, _ = torch.cuda.mem_get_info(device)
    return memory_left(free, decoders, settings)


def memory_left(free: int, decoders: Sequence[Decoder], settings: EngineSettings) -> int:
    """Of ``free`` bytes beside the weights, what passes and samples leave. Raises ConfigError if that is nothing."""
    each = [(decoder.config, settings, decoder.dtype.itemsize) for decoder in decoders]
    planned = max(_pass_bytes(*one) for one in each) + sum(_sample_bytes(*one) for one in each)
    left = int(free - _PASS_MARGIN * planned)
    if left <= 0:
        raise ConfigError(
            f"engine: passes and samples need about {_PASS_MARGIN * planned / 2**30:.1f} GiB beside the base weights, "
            f"and {free / 2**30:.1f} GiB are free; lower engine.micro_batch_tokens or engine.kv_cache_tokens"
        )
    return left


def _pass_bytes(config: DecoderConfig, settings: EngineSettings, item_bytes: int) -> int:
    return settings.micro_batch_tokens * config.num_layers * _kept_bytes_per_row(config, item_bytes)


def _sample_bytes(config: DecoderConfig, settings: EngineSettings, item_bytes: int) -> int:
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * item_bytes
    return settings.kv_cache_tokens * per_token


def _kept_bytes_per_row(config: DecoderConfig, item_bytes: int) -> int:
    """Of one layer, for the backward: two residuals in float32; in the compute dtype the inputs of the linears, and
    queries, keys, values, gate and up."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inputs = 2 * config.hidden_size + queries + config.intermediate_size
    outputs = queries + 2 * keys + 2 * config.intermediate_size
    return 2 * 4 * config.hidden_size + item_bytes * (inputs + outputs)
