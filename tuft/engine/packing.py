"""The layout of one pass: the sequences of its parts end to end, what a part's sequences share laid out once.

Shape letters: ``T`` packed rows of a pass, ``M`` target tokens of a pass (row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuft.models.branches import Branch, Span
from tuft.prefixes import shared_with_previous
from tuft.types import Datum, Int64Array


@dataclass(frozen=True, slots=True)
class PackedPass:
    """``row_bounds`` and ``target_bounds``: where each part's rows and targets lie.

    ``target_orders``: a part's targets are sorted by row; the i-th of them is number ``target_orders[part][i]`` if its
    data are counted through one by one.
    """

    tokens_T: Int64Array
    positions_T: Int64Array
    branches: tuple[Branch, ...]
    target_rows_M: Int64Array
    target_tokens_M: Int64Array
    row_bounds: tuple[Span, ...]
    target_bounds: tuple[Span, ...]
    target_orders: tuple[Int64Array, ...]


def pack(parts: Sequence[Sequence[Datum]], share_prefixes: bool) -> PackedPass:
    """Lay the parts' sequences end to end. ``target_tokens`` may be ``[T]`` or ``[T, K]``: K targets a row.

    With ``share_prefixes`` a sequence that begins like the one before it has rows only for what it does not share, so a
    row may be a position of several data, and has the targets of all of them.
    """
    branches: list[Branch] = []
    tokens, positions, target_rows, target_tokens, orders, row_bounds = [], [], [], [], [], []
    num_rows = 0
    for data in parts:
        first_row, rows, of_part = num_rows, [], []
        shared = shared_with_previous([datum.tokens_T for datum in data]) if share_prefixes else [0] * len(data)
        path: tuple[Span, ...] = ()
        for datum, num_shared in zip(data, shared, strict=True):
            branch = Branch(num_rows, num_rows + datum.num_tokens - num_shared, _beginning(path, num_shared))
            path = _joined((*branch.prefix, (branch.start, branch.stop)))
            tokens.append(datum.tokens_T[num_shared:])
            positions.append(np.arange(num_shared, datum.num_tokens))
            targets = np.asarray(datum.loss_fn_inputs["target_tokens"], dtype=np.int64)
            path_T = np.concatenate([np.arange(start, stop) for start, stop in path])
            rows.append(np.repeat(path_T, targets.size // datum.num_tokens))
            of_part.append(targets.ravel())
            branches.append(branch)
            num_rows = branch.stop
        part_rows = np.concatenate(rows)
        orders.append(np.argsort(part_rows, kind="stable"))
        target_rows.append(part_rows[orders[-1]])
        target_tokens.append(np.concatenate(of_part)[orders[-1]])
        row_bounds.append((first_row, num_rows))
    stops = np.cumsum([len(order) for order in orders]).tolist()
    return PackedPass(
        tokens_T=np.concatenate(tokens),
        positions_T=np.concatenate(positions),
        branches=tuple(branches),
        target_rows_M=np.concatenate(target_rows),
        target_tokens_M=np.concatenate(target_tokens),
        row_bounds=tuple(row_bounds),
        target_bounds=tuple((stop - len(order), stop) for stop, order in zip(stops, orders, strict=True)),
        target_orders=tuple(orders),
    )


def _beginning(path: Sequence[Span], num_rows: int) -> tuple[Span, ...]:
    """The first ``num_rows`` rows of ``path``."""
    spans: list[Span] = []
    for start, stop in path:
        if num_rows == 0:
            break
        spans.append((start, min(stop, start + num_rows)))
        num_rows -= spans[-1][1] - start
    return tuple(spans)


def _joined(path: Sequence[Span]) -> tuple[Span, ...]:
    """Spans that follow each other become one."""
    spans: list[Span] = []
    for start, stop in path:
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    return tuple(spans)
