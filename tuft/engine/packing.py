"""Which tokens are computed together: operations are cut into chunks, chunks are packed into micro-batches.

The cut depends on the operation alone, so its gradients are summed in the same order whoever shares its batch.
Shape letters: ``T`` packed rows of a micro-batch, ``M`` target tokens of a micro-batch (row by row).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tuft.engine.base import RunLoss
from tuft.types import Int64Array


@dataclass(frozen=True, slots=True)
class Chunk:
    """The data ``first:stop`` of the operation at index ``operation``: whole sequences, computed in one pass."""

    operation: int
    first: int
    stop: int
    num_tokens: int


MicroBatch = tuple[Chunk, ...]


def cut(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int, int]]:
    """Consecutive sequences, as many as fit into ``max_tokens``: ``(first, stop, num_tokens)``. A sequence longer than
    that stands alone."""
    cuts: list[tuple[int, int, int]] = []
    first = num_tokens = 0
    for index, length in enumerate(lengths):
        if index > first and num_tokens + length > max_tokens:
            cuts.append((first, index, num_tokens))
            first, num_tokens = index, 0
        num_tokens += length
    if len(lengths) > first:
        cuts.append((first, len(lengths), num_tokens))
    return cuts


def plan(operations: Mapping[int, RunLoss], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of at most ``max_tokens`` each, short operations (index to operation) first so that they end early.

    Operations of one adapter keep their order: the key is what the adapter has asked for up to and including the
    operation. Forward and forward_backward are never mixed; a forward pass keeps nothing for a backward.
    """
    asked: defaultdict[str, int] = defaultdict(int)
    keys = []
    for index, operation in operations.items():
        asked[operation.adapter_id] += operation.num_tokens
        keys.append((operation.backward, asked[operation.adapter_id], index))
    batches: list[MicroBatch] = []
    open_batch: list[Chunk] = []
    open_tokens, open_backward = 0, False
    for backward, _, index in sorted(keys):
        for first, stop, num_tokens in cut([datum.num_tokens for datum in operations[index].data], max_tokens):
            if open_batch and (open_tokens + num_tokens > max_tokens or backward != open_backward):
                batches.append(tuple(open_batch))
                open_batch, open_tokens = [], 0
            open_batch.append(Chunk(index, first, stop, num_tokens))
            open_tokens, open_backward = open_tokens + num_tokens, backward
    if open_batch:
        batches.append(tuple(open_batch))
    return batches


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """A micro-batch end to end. ``row_bounds`` and ``target_bounds``: where each chunk's rows and targets lie."""

    tokens_T: Int64Array
    positions_T: Int64Array
    lengths: tuple[int, ...]
    target_rows_M: Int64Array
    target_tokens_M: Int64Array
    row_bounds: tuple[tuple[int, int], ...]
    target_bounds: tuple[tuple[int, int], ...]


def pack(operations: Sequence[RunLoss], batch: MicroBatch) -> PackedTokens:
    """Lay the chunks' sequences end to end. ``target_tokens`` may be ``[T]`` or ``[T, K]``: K targets a row."""
    data = [operations[chunk.operation].data[chunk.first : chunk.stop] for chunk in batch]
    flat = [datum for of_chunk in data for datum in of_chunk]
    targets = [np.asarray(datum.loss_fn_inputs["target_tokens"], dtype=np.int64) for datum in flat]
    lengths = tuple(datum.num_tokens for datum in flat)
    starts = np.cumsum((0, *lengths[:-1]))
    rows = [
        np.repeat(np.arange(start, start + length), target.size // length)
        for start, length, target in zip(starts, lengths, targets, strict=True)
    ]
    return PackedTokens(
        tokens_T=np.concatenate([datum.tokens_T for datum in flat]),
        positions_T=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        target_rows_M=np.concatenate(rows),
        target_tokens_M=np.concatenate([target.ravel() for target in targets]),
        row_bounds=_bounds([chunk.num_tokens for chunk in batch]),
        target_bounds=_bounds([sum(datum.loss_fn_inputs["target_tokens"].size for datum in d) for d in data]),
    )


def _bounds(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    stops = np.cumsum(sizes).tolist()
    return tuple((stop - size, stop) for stop, size in zip(stops, sizes, strict=True))
