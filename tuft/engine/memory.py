"""What a base model will need of its device's memory: told at start, so that nobody learns it when it runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tuft.engine.base import EngineSettings
from tuft.errors import ConfigError
from tuft.machine import memory_bytes
from tuft.models.architecture import DecoderConfig
from tuft.models.decoder import Decoder, Precision
from tuft.models.head import MAX_CHUNK_ROWS
from tuft.models.lora import LoraLayout
from tuft.types import LoraSpec, MemoryNeed, MemoryShares

_EXAMPLE_RANK = 32
_PASS_MARGIN = 1.25  # what lives only while a layer is computed, and what the allocator cannot join
_HOST_MARGIN = 1.35  # the same on a CPU, by measurement (docs/adr/0014)
_PROCESS_BYTES = 400 * 2**20  # the interpreter, torch and its libraries
_KERNEL_BYTES = 64 * 2**20  # what the libraries' products keep for themselves
_FEWEST_PASS_TOKENS = 64
_FEWEST_SAMPLE_TOKENS = 256
_ITEM_BYTES: dict[Precision, int] = {"bf16": 2, "float32": 4}
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


def is_packed(decoder: Decoder, settings: EngineSettings) -> bool:
    """Whether decoding keeps the linear weights twice."""
    return settings.packed_decode and decoder.device.type == "cpu" and decoder.precision == "bf16"


def host_limit(settings: EngineSettings) -> int:
    """What everything may take of the host's memory together, in bytes."""
    limit = settings.memory_limit_gib
    return memory_bytes() if limit is None else int(limit * 2**30)


def check_weights(
    config: DecoderConfig,
    settings: EngineSettings,
    precision: Precision,
    device: torch.device,
    before: Sequence[Decoder],
) -> None:
    """Raises ConfigError if the weights of one more base model do not fit the host's memory beside those ``before``."""
    if device.type != "cpu":
        return
    needed = _PROCESS_BYTES + config.num_parameters * _ITEM_BYTES[precision]
    needed += sum(_weight_bytes(decoder, settings) for decoder in before)
    if needed > (limit := host_limit(settings)):
        raise ConfigError(f"{_LIMIT}: the base weights need {needed:,} bytes, and {limit:,} are there")


def fitted(
    settings: EngineSettings, decoders: Sequence[Decoder]
) -> tuple[EngineSettings, list[MemoryShares] | list[None]]:
    """``settings`` with as many tokens in a pass, and in all samples, as fit the host's memory beside the weights, and
    what of it passes and adapters may have; None on a GPU. It depends on nothing but the settings, the base models and
    the size of the memory: how operations are cut must be the same after a restart. Raises ConfigError if too little is
    left.

    A quarter of what the weights leave is the most for samples; passes and adapters share the rest. Half of a pass is
    for its rows, half for the gradients of its adapters.
    """
    if decoders[0].device.type != "cpu":
        return settings, [None] * len(decoders)
    limit = host_limit(settings)
    weights = _PROCESS_BYTES + sum(_weight_bytes(decoder, settings) for decoder in decoders)
    left = max(0, limit - weights)
    token_bytes = sum(sample_token_bytes(decoder.config, decoder.dtype.itemsize) for decoder in decoders)
    sample_tokens = min(settings.kv_cache_tokens, left // 4 // token_bytes)
    share = (left - sample_tokens * token_bytes) // 2
    needs = [_host_pass(decoder) for decoder in decoders]
    pass_tokens = min(settings.micro_batch_tokens, *((share // 2 - fixed) // row for row, _, fixed in needs))
    if pass_tokens < _FEWEST_PASS_TOKENS or sample_tokens < _FEWEST_SAMPLE_TOKENS:
        least = max(4 * (fixed + _FEWEST_PASS_TOKENS * row) for row, _, fixed in needs) * 4 // 3
        least = weights + max(least, 4 * _FEWEST_SAMPLE_TOKENS * token_bytes)
        raise ConfigError(
            f"{_LIMIT}: base weights, the smallest pass and the shortest samples need {least:,} bytes, and {limit:,} "
            "are there; serve a smaller base model, or give more"
        )
    shares = [MemoryShares(share, share, pass_tokens, row, long_row, fixed) for row, long_row, fixed in needs]
    return replace(settings, micro_batch_tokens=pass_tokens, kv_cache_tokens=sample_tokens), shares


_LIMIT = "engine.memory_limit_gib (default: what the machine or its container has)"


def _weight_bytes(decoder: Decoder, settings: EngineSettings) -> int:
    linears = sum(rows * columns for rows, columns in decoder.config.linear_shapes().values())
    numbers = decoder.config.num_parameters + (linears if is_packed(decoder, settings) else 0)
    return numbers * decoder.dtype.itemsize


def _host_pass(decoder: Decoder) -> tuple[int, int, int]:
    """Bytes a row, bytes a row of a sequence whose activations are not kept, and bytes beside, of one pass."""
    config, item_bytes = decoder.config, decoder.dtype.itemsize
    kept = _kept_bytes_per_row(config, item_bytes)
    between = config.num_layers * config.hidden_size * (4 + item_bytes)  # from layer to layer: residual and its norm
    chunk = MAX_CHUNK_ROWS["cpu"] * config.vocab_size * (8 + item_bytes)
    row, long_row = config.num_layers * kept, 2 * between + 4 * kept  # what is computed anew comes beside what is kept
    return int(_HOST_MARGIN * row), int(_HOST_MARGIN * long_row), chunk + _KERNEL_BYTES


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
    return settings.kv_cache_tokens * sample_token_bytes(config, item_bytes)


def sample_token_bytes(config: DecoderConfig, item_bytes: int) -> int:
    """Of keys and values, all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * item_bytes


def _kept_bytes_per_row(config: DecoderConfig, item_bytes: int) -> int:
    """Of one layer, for the backward: two residuals in float32; in the compute dtype the inputs of the linears, and
    queries, keys, values, gate and up."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inputs = 2 * config.hidden_size + queries + config.intermediate_size
    outputs = queries + 2 * keys + 2 * config.intermediate_size
    return 2 * 4 * config.hidden_size + item_bytes * (inputs + outputs)
