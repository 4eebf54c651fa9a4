"""The hidden states of a sampler's step: single tokens of what decodes, and chunks of prompts.

Shape letters: ``T`` rows of a step, ``D`` residual channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuft.engine.decode_batch import DecodeBatch
from tuft.engine.decode_graphs import DecodeGraphs
from tuft.engine.drawing import segments_of
from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.engine.prefix_cache import Chunk, PrefixCache
from tuft.engine.requests import Request
from tuft.engine.step_attention import ChunkRows, StepAttention
from tuft.models.decoder import Decoder
from tuft.models.decoding import PackedAdapters
from tuft.models.lora import Segment
from tuft.models.transfer import to_device


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A chunk of ``request``'s prompt, from ``start`` on, that a step computes."""

    request: Request
    chunk: Chunk
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.chunk.tokens)


class SampleSteps:
    """Computes steps as the decoder's operators do it best: decoded rows all layers in one call or as a graph, else
    operator by operator like the chunks."""

    def __init__(self, decoder: Decoder, pages: KvPages, cache: PrefixCache, packed: PackedAdapters) -> None:
        self._decoder = decoder
        self._pages = pages
        self._cache = cache
        self._no_batch = DecodeBatch((), pages, None, packed)
        self._graphs = DecodeGraphs(decoder, pages) if DecodeGraphs.take(decoder) else None

    def hidden(self, batch: DecodeBatch, parts: Sequence[PromptPart]) -> Tensor:
        """``x_TD``: of the batch, then of the parts."""
        if self._graphs is not None and not parts:
            return self._graphs.hidden(batch, self._cache)
        if self._decoder.step is None:
            return self._by_operators(batch, parts)
        sources = []
        if batch.continuations:  # always this way, whatever else the step has: their bits must not depend on it
            sources.append(self._decoder.step.hidden(batch.tokens, batch.tables(self._cache), batch.lora))
        if parts:
            sources.append(self._by_operators(self._no_batch, parts))
        return sources[0] if len(sources) == 1 else torch.cat(sources)

    def _by_operators(self, batch: DecodeBatch, parts: Sequence[PromptPart]) -> Tensor:
        device, ops = self._decoder.device, self._decoder.ops
        tables = batch.tables(self._cache) if batch.continuations else None
        tokens, positions = batch.tokens, [one.length - 1 for one in batch.continuations]
        segments = segments_of(batch.adapters) if batch.decoded is None else []
        chunks = []
        for part in parts:
            if part.request.adapter is not None:  # a segment each: its bits must not depend on its neighbours
                segments.append(Segment(part.request.adapter, len(tokens), len(tokens) + len(part.chunk.tokens)))
            tokens += part.chunk.tokens
            positions += range(part.start, part.stop)
            pages = part.request.prompt_pages[: num_pages_of(part.stop)]
            chunks.append(ChunkRows(part.start, part.stop - part.start, pages))
        return self._decoder.hidden(
            to_device(tokens, device),
            to_device(positions, device),
            StepAttention(self._pages, tables, ops.decode, chunks, ops.attention),
            segments,
            batch.decoded,
        )
