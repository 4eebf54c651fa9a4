"""The segments of one pass, and ways to compute their low-rank products.

Shape letters: ``T`` packed rows, ``K`` in_features, ``N`` out_features of a group's linears together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tuft.models.lora import LoraGroup, Segment


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows ``start:stop`` that one adapter serves at one group of linears."""

    start: int
    stop: int
    scale: float
    group: LoraGroup
    gradients: LoraGroup | None


def lora_rows(segments: Sequence[Segment], key: str, dtype: torch.dtype) -> list[LoraRows]:
    """The segments whose adapter has the group ``key``, with its matrices in ``dtype``."""
    found = []
    for segment in segments:
        group = segment.adapter.views(dtype).get(key)
        if group is not None:
            gradients = segment.gradients[key] if segment.gradients is not None else None
            found.append(LoraRows(segment.start, segment.stop, segment.adapter.spec.scale, group, gradients))
    return found


class SegmentProducts(Protocol):
    """The low-rank products of some segments of one pass at any group of linears."""

    def add(self, y_TN: Tensor, x_TK: Tensor, key: str) -> list[Tensor]:
        """As ``lora_linear.add_lora``; returns what ``backward`` needs."""
        ...

    def backward(self, dy_TN: Tensor, x_TK: Tensor, dx_TK: Tensor, key: str, kept: list[Tensor]) -> None:
        """As ``lora_linear.lora_backward``."""
        ...


class LoraKernels(Protocol):
    """A way to compute the products of many segments in a few calls."""

    def takes(self, segment: Segment, dtype: torch.dtype) -> bool:
        """Whether it is faster than torch's products. It must depend on the segment alone, not on others."""
        ...

    def products(self, segments: Sequence[Segment], dtype: torch.dtype) -> SegmentProducts:
        """Of ``segments`` that it takes, in order of their rows."""
        ...
