"""How large an adapter is, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from tuft.types import LoraSpec, Optimizer

_BYTES = 4  # of a float32
_NUM_STATES: Mapping[Optimizer, int] = {"adamw": 4, "dimuon": 3}  # the weight, its gradient, and its moments
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


def _has(name: str, spec: LoraSpec) -> bool:
    if name == "lm_head":
        return spec.train_unembed
    return spec.train_attn if ".self_attn." in name else spec.train_mlp
