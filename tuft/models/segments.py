"""The segments of one pass, and where the matrices of their adapters lie.

Shape letters: ``T`` packed rows, ``K`` in_features, ``N`` out_features of a group's linears together, ``R`` LoRA rows
of a group, ``L`` its linears, ``S`` segments, ``J`` blocks of rows.
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


@dataclass(frozen=True, slots=True)
class GroupTables:
    """One group of linears as kernels read it. ``sizes_L``: out_features of each linear. ``addresses_4S``: where A, B,
    the gradients of A and those of B begin, for every segment; 0 where there are none."""

    sizes_L: Tensor
    addresses_4S: Tensor


class SegmentTables:
    """Segments as kernels read them, made once a pass. ``blocks_J3``: segment, first row and number of rows of every
    block of rows."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, block_rows: int) -> None:
        self._segments = segments
        self._dtype = dtype
        self._groups: dict[str, GroupTables | None] = {}
        self.blocks_J3 = torch.tensor(
            [
                (number, row, min(block_rows, segment.stop - row))
                for number, segment in enumerate(segments)
                for row in range(segment.start, segment.stop, block_rows)
            ]
        )
        self.bounds_S2 = torch.tensor([(segment.start, segment.stop) for segment in segments])
        self.ranks_S = torch.tensor([segment.adapter.spec.rank for segment in segments])
        self.scales_S = torch.tensor([segment.adapter.spec.scale for segment in segments], dtype=torch.float32)
        self.max_rank = int(self.ranks_S.max())

    def __len__(self) -> int:
        return len(self._segments)

    def group(self, key: str) -> GroupTables | None:
        """None if no adapter has it."""
        if key not in self._groups:
            self._groups[key] = self._tables(key)
        return self._groups[key]

    def _tables(self, key: str) -> GroupTables | None:
        sizes: list[int] = []
        addresses = []
        for segment in self._segments:
            of_segment = [0, 0, 0, 0]
            for first, views in ((0, segment.adapter.views(self._dtype)), (2, segment.gradients or {})):
                if key in views:
                    A_RK, Bs_Nr = views[key].A_RK, views[key].Bs_Nr
                    of_segment[first : first + 2] = A_RK.data_ptr(), Bs_Nr[0].data_ptr()
                    sizes = [B_Nr.shape[0] for B_Nr in Bs_Nr]
            addresses.append(of_segment)
        return GroupTables(torch.tensor(sizes), torch.tensor(addresses).t().contiguous()) if sizes else None


class LoraKernels(Protocol):
    """Kernels that compute the low-rank products of many segments at a group of linears in one call."""

    block_rows: int
    """Rows of a block in ``SegmentTables``."""

    def takes(self, segment: Segment, dtype: torch.dtype) -> bool:
        """Whether the kernels are faster than torch's products. It must depend on the segment alone, not on others."""
        ...

    def add(self, y_TN: Tensor, x_TK: Tensor, segments: SegmentTables, group: GroupTables) -> Tensor:
        """As ``lora_linear.add_lora``; returns ``h_TR``, undefined in rows of no segment."""
        ...

    def backward(
        self,
        dy_TN: Tensor,
        x_TK: Tensor,
        dx_TK: Tensor,
        segments: SegmentTables,
        group: GroupTables,
        h_TR: Tensor,
    ) -> None:
        """As ``lora_linear.lora_backward``."""
        ...
