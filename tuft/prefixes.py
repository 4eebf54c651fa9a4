"""Sequences that begin alike: which tokens a pass has to compute, and how an operation is cut into passes.

In a group of answers to one prompt, or in the turns of one conversation, each sequence begins like the one before it.
What it shares with its predecessor is computed once. Pure numpy: the service cuts, the engine computes.
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
    """The sequences ``first:stop`` of an operation, whose distinct tokens are ``num_rows``."""

    first: int
    stop: int
    num_rows: int


def cut(sequences: Sequence[Int64Array], max_rows: int) -> list[Cut]:
    """Consecutive sequences, as many as need no more than ``max_rows`` rows together; one that needs more by itself
    stands alone. The cut depends on the operation alone, so its gradients are summed in the same order whoever shares
    its passes."""
    shared = shared_with_previous(sequences)
    cuts: list[Cut] = []
    first = num_rows = 0
    for index, sequence in enumerate(sequences):
        own = len(sequence) - shared[index]
        if index > first and num_rows + own > max_rows:
            cuts.append(Cut(first, index, num_rows))
            first, num_rows, own = index, 0, len(sequence)
        num_rows += own
    if len(sequences) > first:
        cuts.append(Cut(first, len(sequences), num_rows))
    return cuts
