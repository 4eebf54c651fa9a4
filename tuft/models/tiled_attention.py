"""Attention along branches of packed rows by kernels that take 64 queries and 64 keys at a time.

Shape letters: ``T`` packed rows, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``B`` branches,
``N`` tiles of keys, ``R`` trees (branches that share rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

TILE_ROWS = 64


@dataclass(frozen=True, slots=True)
class TileTables:
    """All int64. ``branches_B4``: first row and end, first tile that it sees, first tile of its own rows (it sees all
    between). ``tiles_N2``: first row and number of rows. ``trees_R4``: first branch and end, first row and end.
    ``*_costs``: the sum of products of tiles before each, and of all."""

    branches_B4: Tensor
    branch_costs: Tensor
    tiles_N2: Tensor
    trees_R4: Tensor
    tree_costs: Tensor
    max_tiles: int
    max_tree_rows: int

    @classmethod
    def of(cls, branches: Iterable[Sequence[tuple[int, int]]]) -> TileTables:
        """Each branch as the spans of rows that it sees, its own last. One that sees others follows them."""
        table: list[tuple[int, int, int, int]] = []
        tiles: list[tuple[int, int]] = []
        trees: list[list[int]] = []
        costs: list[int] = []
        tree_costs: list[int] = []
        for number, spans in enumerate(branches):
            first = len(tiles)
            for start, stop in spans:
                own = len(tiles)
                tiles += [(row, min(TILE_ROWS, stop - row)) for row in range(start, stop, TILE_ROWS)]
            start, stop = spans[-1]
            table.append((start, stop, first, own))
            num_own = len(tiles) - own
            costs.append(num_own * (own - first) + num_own * (num_own + 1) // 2)
            if len(spans) == 1 or not trees:
                trees.append([number, number, start, stop])
                tree_costs.append(0)
            while spans[0][0] < trees[-1][2]:  # it sees rows of an earlier tree: with all that follows they are one
                trees.pop()
                tree_costs[-2:] = [sum(tree_costs[-2:])]
            trees[-1][1], trees[-1][3] = number + 1, stop
            tree_costs[-1] += costs[-1]
        return cls(
            torch.tensor(table),
            torch.tensor([0, *accumulate(costs)]),
            torch.tensor(tiles),
            torch.tensor(trees),
            torch.tensor([0, *accumulate(tree_costs)]),
            max(own - first + -(-(stop - start) // TILE_ROWS) for start, stop, first, own in table),
            max(stop - start for _, _, start, stop in trees),
        )


class AttentionKernels(Protocol):
    """A row's bits depend on nothing but the rows that it sees. Of queries, keys and values the rows may lie apart."""

    def forward(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, tables: TileTables) -> tuple[Tensor, Tensor]:
        """Contexts ``[T, H, d]``, and what the backward needs of each row and head, float32 ``[T, H, 2]``."""
        ...

    def backward(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        stats_TH2: Tensor,
        dout_THd: Tensor,
        tables: TileTables,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv; every key must be of a row that a branch has."""
        ...


class TiledAttention(torch.autograd.Function):
    """Contexts ``[T, H, d]`` of rotated queries and keys."""

    @staticmethod
    def forward(
        ctx: Any, kernels: AttentionKernels, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, tables: TileTables
    ) -> Tensor:
        out_THd, stats_TH2 = kernels.forward(q_THd, k_TGd, v_TGd, tables)
        ctx.kernels, ctx.tables = kernels, tables
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, stats_TH2)
        return out_THd

    @staticmethod
    def backward(ctx: Any, dout_THd: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, out_THd, stats_TH2 = ctx.saved_tensors
        dq_THd, dk_TGd, dv_TGd = ctx.kernels.backward(tuple(qkv), out_THd, stats_TH2, dout_THd, ctx.tables)
        return None, dq_THd, dk_TGd, dv_TGd, None
