"""Attention of one step of the sampler: single new tokens of many sequences, then chunks of prompts.

A chunk attends as the trainer's rows do, to the chunks before it and causally to itself; by kernels, bit for bit so.
By torch's operators chunks are computed together only with others of the same length and place. So bits do not depend
on what else is in the step.

Shape letters: ``T`` rows of a step, ``B`` those decoded, ``L`` those of chunks, ``H`` query heads, ``G`` key-value
heads, ``d`` channels of a head, ``P`` pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tuft.engine.kv_pages import KvPages, num_pages_of, page_rows
from tuft.models.block_attention import BlockAttention, BlockGroup, kernel_attention
from tuft.models.branches import Span, rows_of
from tuft.models.decoding import DecodeKernels
from tuft.models.paged_attention import PAGE_TOKENS, PageTables, paged_attention
from tuft.models.tiled_attention import AttentionKernels, TileTables
from tuft.models.transfer import to_device


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The rows of one chunk, ``num_rows`` at position ``start``; ``pages``: its sequence's up to its own, in order."""

    start: int
    num_rows: int
    pages: Sequence[int]


class StepAttention:
    """``tuft.models.decoder.Attention`` over the rows that ``tables`` describes, if any, and those of ``chunks``."""

    def __init__(
        self,
        pages: KvPages,
        tables: PageTables | None,
        kernels: DecodeKernels | None,
        chunks: Sequence[ChunkRows],
        chunk_kernels: AttentionKernels | None = None,
    ) -> None:
        self._tables = tables
        self._attend_decoded = paged_attention if kernels is None else kernels.attend
        self._num_decoded = 0 if tables is None else len(tables.lengths)
        self._chunks = _ChunkAttention(pages, chunks, chunk_kernels) if chunks else None

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        num_decoded = self._num_decoded
        contexts = []
        if self._tables is not None:
            rows = slice(num_decoded)
            contexts.append(self._attend_decoded(layer, q_THd[rows], k_TGd[rows], v_TGd[rows], self._tables))
        if self._chunks is not None:
            rows = slice(num_decoded, None)
            contexts.append(self._chunks.attend(layer, q_THd[rows], k_TGd[rows], v_TGd[rows]))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


class _ChunkAttention:
    def __init__(self, pages: KvPages, chunks: Sequence[ChunkRows], kernels: AttentionKernels | None) -> None:
        self._pages = pages
        device = pages.pages.device
        lengths = [chunk.num_rows for chunk in chunks]
        own = [page for chunk in chunks for page in chunk.pages[-num_pages_of(chunk.num_rows) :]]
        self._own_P = to_device(own, device, torch.int64)
        self._page_rows = to_device(page_rows(lengths), device)
        num_rows = sum(lengths)
        seen: list[tuple[Span, ...]] = []  # keys: rows of the step, then positions read
        earlier: list[int] = []
        for chunk, stop in zip(chunks, accumulate(lengths), strict=True):
            spans: tuple[Span, ...] = ((stop - chunk.num_rows, stop),)
            if chunk.start:
                first = num_rows + len(earlier) * PAGE_TOKENS
                spans = ((first, first + chunk.start), *spans)
                earlier += chunk.pages[: num_pages_of(chunk.start)]
            seen.append(spans)
        self._earlier_P = to_device(earlier, device, torch.int64)
        self._kernels = kernels
        if kernels is not None:
            self._tables = TileTables.of(seen)
            return
        alike: dict[tuple[int, int], list[tuple[Span, ...]]] = {}
        for chunk, spans in zip(chunks, seen, strict=True):
            alike.setdefault((chunk.num_rows, chunk.start), []).append(spans)
        self._groups = [_group(spans, length, device) for (length, _), spans in alike.items()]

    def attend(self, layer: int, q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> Tensor:
        self._pages.write(layer, self._own_P, self._page_rows, k_LGd, v_LGd)
        if len(self._earlier_P):
            earlier_k, earlier_v = self._pages.read(layer, self._earlier_P)
            k_LGd, v_LGd = torch.cat([k_LGd, earlier_k]), torch.cat([v_LGd, earlier_v])
        if self._kernels is not None:
            return self._kernels.forward(q_LHd, k_LGd, v_LGd, self._tables)[0]
        if q_LHd.device.type != "cpu":
            return kernel_attention(q_LHd, k_LGd, v_LGd, self._groups)
        out_LHd: Tensor = BlockAttention.apply(q_LHd, k_LGd, v_LGd, self._groups, False)
        return out_LHd


def _group(key_spans: Sequence[tuple[Span, ...]], length: int, device: torch.device) -> BlockGroup:
    """Chunks of one length and place."""
    return BlockGroup(
        rows=rows_of([spans[-1] for spans in key_spans], device),
        keys=rows_of([span for spans in key_spans for span in spans], device),
        key_spans=tuple(key_spans),
        mask_LL=torch.full((length, length), -torch.inf, device=device).triu_(1),
        is_causal=len(key_spans[0]) == 1,
    )
