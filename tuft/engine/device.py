"""Where the engine computes, how precisely, and how its process keeps memory."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import replace
from typing import Literal

import torch

from tuft.engine.base import EngineSettings
from tuft.errors import ConfigError
from tuft.models.decoder import Precision

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_TOP_PAD_BYTES = 64 * 2**20

_PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
"""A CPU gains nothing from larger passes; a GPU's products are fast from some thousand rows on."""


def choose_device(wanted: str) -> torch.device:
    """``auto``: a CUDA device if there is one, else the CPU. A CUDA device always has its number, as its tensors
    say it. Raises ConfigError if ``wanted`` is not here."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device: got {wanted!r}; must be auto, cpu, cuda or cuda:N")
    num_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ConfigError(f"engine.device: got {wanted!r}; this machine has {num_cuda} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def settled(settings: EngineSettings) -> EngineSettings:
    """``settings`` with what suits the device where they leave it open. Raises ConfigError if they cannot be honoured
    on it."""
    device = choose_device(settings.device)
    if settings.adapter_memory_gib is not None and device.type == "cpu":
        raise ConfigError(
            f"engine.adapter_memory_gib: got {settings.adapter_memory_gib:g}; needs a GPU: on a CPU adapters are "
            "in the host's memory anyway"
        )
    if settings.deterministic and device.type != "cpu":
        raise ConfigError(
            "engine.deterministic: got True; needs a CPU: on a GPU products choose their kernel by the number of rows, "
            "so a run's last digits depend on who shares its passes"
        )
    return replace(
        settings,
        micro_batch_tokens=settings.micro_batch_tokens or _PASS_TOKENS[device.type],
        deterministic=device.type == "cpu" and settings.deterministic is not False,
    )


def choose_precision(wanted: Literal["auto", "bf16", "float32"], device: torch.device) -> Precision:
    """``auto``: bf16 where the hardware multiplies it natively; emulated it would be slower than float32."""
    if wanted != "auto":
        return wanted
    return "bf16" if _has_bf16(device) else "float32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """Make glibc keep what this process frees, for its next step, instead of returning it to the system.

    A step allocates and frees gigabytes in blocks of tens of megabytes; fetched afresh from the system, page by page,
    they took a fifth of a CPU step's time (see bench/RESULTS.md). The price: the process stays as large as its largest
    step, which is bounded by ``micro_batch_tokens``. Call it once, after loading: what that has freed is given back
    first. Only glibc has it.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    mallopt = libc.mallopt
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES)):
        mallopt(option, value)
