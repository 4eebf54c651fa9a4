"""Rows of sequences that may share a beginning, and how rows are taken out of a pass and put back.

Shape letters: ``T`` packed rows, ``N`` some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Span = tuple[int, int]
"""Rows ``start:stop``."""

Rows = Tensor | Span
"""Some rows of a pass: their numbers ``[N]``, or a span where they follow each other."""


@dataclass(frozen=True, slots=True)
class Branch:
    """The rows ``start:stop`` of one sequence. ``prefix``: earlier rows, in order of position, that it begins with and
    shares with other sequences; none if the rows are the whole sequence."""

    start: int
    stop: int
    prefix: tuple[Span, ...] = ()


def rows_of(spans: Sequence[Span], device: torch.device) -> Rows:
    """The rows of ``spans``, one span after another."""
    if all(before[1] == after[0] for before, after in pairwise(spans)):
        return spans[0][0], spans[-1][1]
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """A view of a span, else a copy."""
    return x.index_select(0, rows) if isinstance(rows, Tensor) else x[rows[0] : rows[1]]


def put_rows(out: Tensor, rows: Rows, x: Tensor) -> None:
    if isinstance(rows, Tensor):
        out.index_copy_(0, rows, x.to(out.dtype))
    else:
        out[rows[0] : rows[1]] = x
