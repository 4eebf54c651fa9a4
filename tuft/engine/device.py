"""Where the engine computes, and how precisely."""

from __future__ import annotations

from typing import Literal

import torch

from tuft.errors import ConfigError
from tuft.models.decoder import Precision


def choose_device(wanted: str) -> torch.device:
    """``auto``: a CUDA device if there is one, else the CPU. Raises ConfigError if ``wanted`` is not here."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device: got {wanted!r}; must be auto, cpu, cuda or cuda:N")
    num_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ConfigError(f"engine.device: got {wanted!r}; this machine has {num_cuda} CUDA devices")
    return device


def choose_precision(wanted: Literal["auto", "bf16", "float32"], device: torch.device) -> Precision:
    """``auto``: bf16 where the hardware multiplies it natively; emulated it would be slower than float32."""
    if wanted != "auto":
        return wanted
    return "bf16" if _has_bf16(device) else "float32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
