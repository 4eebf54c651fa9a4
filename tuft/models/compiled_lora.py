"""``segments.LoraKernels`` over the compiled kernels. CPU only.

Shape letters: ``T`` packed rows, ``K`` in_features, ``N`` out_features of a group's linears together, ``R`` LoRA rows
of a group, ``L`` its linears, ``S`` segments, ``J`` blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tuft.models.kernels import lora_segments as kernels
from tuft.models.kernels.native import SERIAL_ELEMENTS, Kernel
from tuft.models.lora import Segment
from tuft.models.workspace import Workspace

_F32_BYTES = 4

_MAX_BF16_WORK = 49_152
"""Rows times rank; beyond, torch's products are as fast."""


@dataclass(frozen=True, slots=True)
class _GroupTables:
    """One group of linears as kernels read it. ``sizes_L``: out_features of each linear. ``addresses_4S``: where A, B,
    the gradients of A and those of B begin, for every segment; 0 where there are none."""

    sizes_L: Tensor
    addresses_4S: Tensor


class _SegmentTables:
    """Segments as kernels read them, made once a pass. ``blocks_J3``: segment, first row and number of rows of every
    block of rows."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, block_rows: int) -> None:
        self._views = [(one.adapter.layout, one.adapter.views(dtype), one.gradients) for one in segments]
        self._groups: dict[str, _GroupTables | None] = {}
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
        return len(self._views)

    def group(self, key: str) -> _GroupTables | None:
        """None if no adapter has it."""
        if key not in self._groups:
            self._groups[key] = self._tables(key)
        return self._groups[key]

    def _tables(self, key: str) -> _GroupTables | None:
        sizes: list[int] = []
        addresses = []
        for layout, views, gradients in self._views:
            if key in layout.by_key:
                sizes = [B.shape[0] for B in layout.by_key[key].Bs]
            addresses.append((*views.addresses(key), *((0, 0) if gradients is None else gradients.addresses(key))))
        return _GroupTables(torch.tensor(sizes), torch.tensor(addresses).t().contiguous()) if sizes else None


class CompiledLora:
    """``segments.LoraKernels``, bf16 and float32."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def takes(self, segment: Segment, dtype: torch.dtype) -> bool:
        return dtype == torch.float32 or (segment.stop - segment.start) * segment.adapter.spec.rank <= _MAX_BF16_WORK

    def products(self, segments: Sequence[Segment], dtype: torch.dtype) -> CompiledProducts:
        return CompiledProducts(_SegmentTables(segments, dtype, kernels.BLOCK_ROWS), self._workspace)


class CompiledProducts:
    """``segments.SegmentProducts``; ``h_TR``, which is kept, is undefined in rows of no segment."""

    def __init__(self, tables: _SegmentTables, workspace: Workspace) -> None:
        self._tables = tables
        self._workspace = workspace

    def add(self, y_TN: Tensor, x_TK: Tensor, key: str) -> list[Tensor]:
        group = self._tables.group(key)
        if group is None:
            return []
        h_TR = x_TK.new_empty(len(x_TK), len(group.sizes_L) * self._tables.max_rank)
        run = kernels.forward_bf16 if x_TK.dtype == torch.bfloat16 else kernels.forward_float32
        self._run_rows(run, x_TK, y_TN, h_TR, x_TK.shape[1], group)
        return [h_TR]

    def backward(self, dy_TN: Tensor, x_TK: Tensor, dx_TK: Tensor, key: str, kept: list[Tensor]) -> None:
        group = self._tables.group(key)
        if group is None:
            return
        (h_TR,) = kept
        in_features = x_TK.shape[1]
        is_bf16 = x_TK.dtype == torch.bfloat16
        dh_TR = torch.empty_like(h_TR)
        run = kernels.backward_bf16 if is_bf16 else kernels.backward_float32
        self._run_rows(run, dy_TN, dx_TK, dh_TR, in_features, group)
        add_gradients = kernels.gradients_bf16 if is_bf16 else kernels.gradients_float32
        pieces = _pieces(in_features, tuple(group.sizes_L.tolist()))
        add_gradients(
            SERIAL_ELEMENTS,
            len(self._tables),
            len(pieces),
            in_features,
            len(group.sizes_L),
            group.sizes_L.data_ptr(),
            pieces.data_ptr(),
            self._tables.bounds_S2.data_ptr(),
            self._tables.ranks_S.data_ptr(),
            group.addresses_4S[2].data_ptr(),
            group.addresses_4S[3].data_ptr(),
            x_TK.data_ptr(),
            _step(x_TK),
            dy_TN.data_ptr(),
            _step(dy_TN),
            h_TR.data_ptr(),
            dh_TR.data_ptr(),
            _step(h_TR),
            *self._workspace.of_threads(kernels.gradient_work(0, h_TR.shape[1], h_TR.element_size())[-1]),
        )

    def _run_rows(
        self,
        run: Kernel,
        given: Tensor,
        added_to: Tensor,
        h_TR: Tensor,
        in_features: int,
        group: _GroupTables,
    ) -> None:
        segments = self._tables
        run(
            SERIAL_ELEMENTS,
            len(segments.blocks_J3),
            in_features,
            len(group.sizes_L),
            group.sizes_L.data_ptr(),
            segments.blocks_J3.data_ptr(),
            len(segments),
            group.addresses_4S[0].data_ptr(),
            group.addresses_4S[1].data_ptr(),
            segments.ranks_S.data_ptr(),
            segments.scales_S.data_ptr(),
            given.data_ptr(),
            _step(given),
            added_to.data_ptr(),
            _step(added_to),
            h_TR.data_ptr(),
            _step(h_TR),
            *self._workspace.of_threads(_F32_BYTES * kernels.BLOCK_ROWS * h_TR.shape[1]),
        )


def _step(x: Tensor) -> int:
    """Bytes from row to row; the elements of a row follow each other."""
    assert x.stride(1) == 1
    return x.stride(0) * x.element_size()


@lru_cache(maxsize=64)
def _pieces(in_features: int, sizes: tuple[int, ...]) -> Tensor:
    """Columns of a gradient that one thread sums: linear (-1: of A), first column, number of columns."""
    return torch.tensor(
        [
            (linear, first, min(kernels.BLOCK_COLUMNS, size - first))
            for linear, size in ((-1, in_features), *enumerate(sizes))
            for first in range(0, size, kernels.BLOCK_COLUMNS)
        ]
    )
