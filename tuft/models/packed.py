"""Attention over packed sequences: many end to end in one batch, none sees another but for a beginning they share.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``L`` rows of a
block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tuft.models.block_attention import BlockAttention, BlockGroup, kernel_attention
from tuft.models.branches import Branch, Span, rows_of
from tuft.models.flash_attention import FlashPackedAttention, flash_takes
from tuft.models.ops import Ops
from tuft.models.tiled_attention import AttentionKernels, TiledAttention, TileTables

_MAX_BLOCK_ROWS = 128
"""More rows compute more scores that the causal mask throws away, fewer make the products inefficient."""

_ROW_MULTIPLE = 32
"""Products of such numbers of rows are the faster ones."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive rows behind the same ``prefix``: a piece of a branch, or branches of ``lengths``, which do not see
    each other."""

    start: int
    lengths: tuple[int, ...]
    prefix: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)


class PackedAttention:
    """Causal attention along every branch and its prefix.

    Blocks of whole sequences are computed together with others of exactly their shape, never padded; branches with a
    prefix only with those of the same prefix. So a sequence's result is bit-equal whatever stands beside it.
    """

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        max_rows = _MAX_BLOCK_ROWS if self._on_cpu else branches[-1].stop
        whole = [block for branch in branches if not branch.prefix for block in _pieces(branch, max_rows)]
        alike: defaultdict[tuple[int, int], list[_Block]] = defaultdict(list)
        for block in whole:
            alike[block.num_rows, _num_rows(block.prefix)].append(block)
        behind = _behind_prefixes([branch for branch in branches if branch.prefix], max_rows)
        self.groups = [_group(blocks, device) for blocks in (*alike.values(), *([block] for block in behind))]
        self._is_tree = any(block.prefix for block in (*whole, *behind))

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:  # noqa: ARG002
        """Rotated queries and keys in, contexts ``[T, H, d]`` out."""
        if not self._on_cpu:
            return kernel_attention(q_THd, k_TGd, v_TGd, self.groups)
        out_THd: Tensor = BlockAttention.apply(q_THd, k_TGd, v_TGd, self.groups, self._is_tree)
        return out_THd


class TiledPackedAttention:
    """The same by compiled kernels."""

    def __init__(self, branches: Sequence[Branch], kernels: AttentionKernels) -> None:
        self._kernels = kernels
        self._tables = TileTables.of((*branch.prefix, (branch.start, branch.stop)) for branch in branches)

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:  # noqa: ARG002
        out_THd: Tensor = TiledAttention.apply(self._kernels, q_THd, k_TGd, v_TGd, self._tables)
        return out_THd


def packed_attention(
    branches: Sequence[Branch], ops: Ops, head_dim: int, dtype: torch.dtype, device: torch.device
) -> PackedAttention | TiledPackedAttention | FlashPackedAttention:
    """As ``ops`` does it best for ``dtype`` and ``head_dim``."""
    if ops.attention is not None:
        return TiledPackedAttention(branches, ops.attention)
    if ops.has_flash_attention and flash_takes(dtype, head_dim, device):
        return FlashPackedAttention(branches, device)
    return PackedAttention(branches, device)


def _pieces(branch: Branch, max_rows: int) -> list[_Block]:
    """A branch in blocks of about equal size; each sees those before it."""
    num_rows = branch.stop - branch.start
    num_pieces = math.ceil(num_rows / max_rows)
    size = _ROW_MULTIPLE * math.ceil(num_rows / num_pieces / _ROW_MULTIPLE)
    return [
        _Block(
            start,
            (min(size, branch.stop - start),),
            branch.prefix if start == branch.start else (*branch.prefix, (branch.start, start)),
        )
        for start in range(branch.start, branch.stop, size)
    ]


def _behind_prefixes(branches: Sequence[Branch], max_rows: int) -> list[_Block]:
    """Branches of one prefix share blocks: a prefix's keys are read once for many short answers to it."""
    blocks: list[_Block] = []
    for branch in branches:
        last = blocks[-1] if blocks else None
        if last and last.prefix == branch.prefix and last.num_rows + branch.stop - branch.start <= max_rows:
            blocks[-1] = _Block(last.start, (*last.lengths, branch.stop - branch.start), last.prefix)
        else:
            blocks += _pieces(branch, max_rows)
    return blocks


def _group(blocks: Sequence[_Block], device: torch.device) -> BlockGroup:
    """``blocks`` are of one shape."""
    own = [(block.start, block.start + block.num_rows) for block in blocks]
    key_spans = tuple((*block.prefix, span) for block, span in zip(blocks, own, strict=True))
    branch_L = np.repeat(np.arange(len(blocks[0].lengths)), blocks[0].lengths)
    is_visible_LL = (branch_L[:, None] == branch_L) & np.tri(len(branch_L), dtype=np.bool_)
    return BlockGroup(
        rows=rows_of(own, device),
        keys=rows_of([span for spans in key_spans for span in spans], device),
        key_spans=key_spans,
        mask_LL=torch.as_tensor(np.where(is_visible_LL, np.float32(0), np.float32(-np.inf)), device=device),
        is_causal=not blocks[0].prefix and len(blocks[0].lengths) == 1,
    )


def _num_rows(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)
