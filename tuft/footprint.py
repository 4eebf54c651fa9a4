"""How much memory or disk something takes, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuft.errors import InvalidInput
from tuft.types import BaseModelInfo, Datum, LoraSpec, MemoryShares, Optimizer

_BYTES = 4  # of a float32
_NUM_STATES: Mapping[Optimizer, int] = {"adamw": 4, "dimuon": 3}  # the weight, its gradient, and its moments
_GRADIENTS = 2  # beside the adapter's own: a part's, and those of the parts before it
_FILE_OVERHEAD_BYTES = 4096  # of a checkpoint's small files and of safetensors' headers, without the names
_NAME_BYTES = 200  # of one tensor in a header


def adapter_parameters(linear_shapes: Mapping[str, tuple[int, int]], spec: LoraSpec) -> int:
    """Numbers in the LoRA matrices of ``spec`` on a base model's linears (``BaseModelInfo.linear_shapes``)."""
    return sum(spec.rank * (rows + columns) for name, (rows, columns) in linear_shapes.items() if _has(name, spec))


def resident_bytes(linear_shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, optimizer: Optimizer) -> int:
    """What a loaded run holds: float32 weights, gradients and moments."""
    return adapter_parameters(linear_shapes, spec) * _BYTES * _NUM_STATES[optimizer]


def checkpoint_bytes(
    linear_shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, optimizer: Optimizer, *, with_optimizer: bool
) -> int:
    """What a checkpoint takes at most: float32 weights, with the optimizer also gradients and moments."""
    num_states = _NUM_STATES[optimizer] if with_optimizer else 1
    num_tensors = 2 * num_states * sum(_has(name, spec) for name in linear_shapes)
    numbers = adapter_parameters(linear_shapes, spec) * num_states
    return numbers * _BYTES + num_tensors * _NAME_BYTES + _FILE_OVERHEAD_BYTES


def gradient_bytes(num_parameters: int) -> int:
    """What a pass holds of an adapter's gradients until the operation has ended."""
    return num_parameters * _BYTES * _GRADIENTS


def longest_sequence(memory: MemoryShares, num_parameters: int) -> int:
    """How many tokens a sequence may have for its pass to fit: it cannot be cut."""
    left = memory.pass_bytes - memory.fixed_bytes - gradient_bytes(num_parameters)
    return max(memory.pass_tokens, left // memory.long_row_bytes)


def check_sequences(
    data: Sequence[Datum], num_parameters: int, memory: MemoryShares | None, numbers: Sequence[int] | None = None
) -> None:
    """Raises InvalidInput for a sequence whose pass needs more memory than a pass may have. ``num_parameters``: of the
    adapter. ``numbers``: the places of ``data`` in the operation, if they are not counted from 0."""
    if memory is None:
        return
    longest = longest_sequence(memory, num_parameters)
    for number, datum in zip(range(len(data)) if numbers is None else numbers, data, strict=True):
        if datum.num_tokens > longest:
            needed = datum.num_tokens * memory.long_row_bytes + memory.fixed_bytes + gradient_bytes(num_parameters)
            allowed = f"needs about {needed:,} bytes of memory, and {memory.pass_bytes:,} are there for a pass"
            where = f"data[{number}].model_input"
            raise InvalidInput(where, f"{datum.num_tokens} tokens", f"{allowed}: at most {longest} tokens")


def check_adapter(spec: LoraSpec, model: BaseModelInfo) -> None:
    """Raises InvalidInput for an adapter that does not fit, all others gone, or whose passes would not."""
    if model.memory is None:
        return
    needed = resident_bytes(model.linear_shapes, spec, "adamw")  # twice what a pass holds of its gradients
    available = min(model.memory.adapter_bytes, model.memory.pass_bytes)
    if needed > available:
        allowed = f"needs {needed:,} bytes of memory on {model.name}, and {available:,} are there for a run"
        raise InvalidInput("lora_config.rank", spec.rank, allowed)


def _has(name: str, spec: LoraSpec) -> bool:
    if name == "lm_head":
        return spec.train_unembed
    return spec.train_attn if ".self_attn." in name else spec.train_mlp
