"""Sequences that begin alike: which tokens a pass has to compute, and how an operation is cut into passes.

In a group of answers to one prompt, or in the turns of one conversation, sequences begin alike. What a sequence shares
with the one before it is computed once, so where it pays those that begin alike are computed one after the other, in
whatever order the user gave them. Pure numpy: the service cuts, the engine computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuft.types import Int64Array

MIN_SHARED_TOKENS = 32
"""A shorter common beginning (a system header, say) is not worth a branch of its own."""


def shared_with_previous(sequences: Sequence[Int64Array]) -> list[int]:
    """For each sequence, how many of its first tokens are those of the one before it; 0 if they are fewer than
    ``MIN_SHARED_TOKENS``, and for the first. A sequence always keeps its last token to itself, so every sequence has
    at least one row of its own."""
    shared = [0] * len(sequences)
    for index in range(1, len(sequences)):
        before, here = sequences[index - 1], sequences[index]
        limit = min(len(before), len(here) - 1)
        differs = np.flatnonzero(before[:limit] != here[:limit])
        common = int(differs[0]) if len(differs) else limit
        shared[index] = common if common >= MIN_SHARED_TOKENS else 0
    return shared


@dataclass(frozen=True, slots=True)
class Cut:
    """Sequences of an operation that are computed in one pass, by their ``numbers`` in the order the user gave, which
    need ``num_rows`` rows (distinct tokens) together. ``first``: how many sequences the cuts before it hold."""

    first: int
    numbers: tuple[int, ...]
    num_rows: int


def cut(sequences: Sequence[Int64Array], max_rows: int) -> list[Cut]:
    """Sequence after sequence, as many as need no more than ``max_rows`` rows together; one that needs more by itself
    stands alone. They are taken in the order given, or, if fewer rows are needed that way, sorted, so that all that
    begin alike stand together. The cut depends on the operation alone, so its gradients are summed in the same order
    whoever shares its passes."""
    keys = [sequence.tobytes() for sequence in sequences]  # any order of tokens will do, also that of their bytes
    orders = range(len(sequences)), sorted(range(len(sequences)), key=keys.__getitem__)
    ways = (_cut_in(order, sequences, max_rows) for order in orders)
    return min(ways, key=lambda cuts: sum(piece.num_rows for piece in cuts))


def _cut_in(order: Sequence[int], sequences: Sequence[Int64Array], max_rows: int) -> list[Cut]:
    shared = shared_with_previous([sequences[number] for number in order])
    cuts: list[Cut] = []
    first = num_rows = 0
    for index, number in enumerate(order):
        own = len(sequences[number]) - shared[index]
        if index > first and num_rows + own > max_rows:
            cuts.append(Cut(first, tuple(order[first:index]), num_rows))
            first, num_rows, own = index, 0, len(sequences[number])
        num_rows += own
    if len(order) > first:
        cuts.append(Cut(first, tuple(order[first:]), num_rows))
    return cuts
