"""Arrays on their way to where they are computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    values: npt.NDArray[Any] | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """``values`` as a tensor on ``device``. A GPU fetches them by itself, from pinned memory, while this goes on."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
