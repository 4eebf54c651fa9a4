"""Decode steps of fixed shapes: captured once as CUDA graphs and replayed, so that a step costs one call.

Numbers of rows and of pages are rounded up to powers of two, so a few captures serve every batch. Rows that nobody
wants read and write the blank page. On other devices a step is computed as it would be captured.

Shape letters: ``B`` rows, ``W`` pages of each, ``S`` slots of adapters, ``D`` residual channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tuft.engine.decode_batch import DecodeBatch
from tuft.engine.kv_pages import KvPages
from tuft.engine.prefix_cache import PrefixCache
from tuft.models.adapter_slots import AdapterSlots, SlotRows, power_of_two
from tuft.models.decoder import Decoder
from tuft.models.lora import Adapter
from tuft.models.paged_attention import PaddedPagedAttention
from tuft.models.transfer import to_device

_MAX_STEPS = 32
"""Captured steps that are kept; the least used leave first."""


class DecodeGraphs:
    """Hidden states of decode batches."""

    def __init__(self, decoder: Decoder, pages: KvPages) -> None:
        self._decoder = decoder
        self._pages = pages
        self._slots = AdapterSlots(decoder.config.linear_shapes(), decoder.dtype, decoder.device)
        self._steps: OrderedDict[tuple[int, int, int], _Step] = OrderedDict()
        self._generation = 0
        self._pool: Any = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    @staticmethod
    def take(decoder: Decoder) -> bool:
        """Whether ``decoder``'s steps can be captured."""
        return decoder.ops.has_decode_graphs and AdapterSlots.can_hold(
            decoder.config.linear_shapes(), decoder.dtype, decoder.device
        )

    def hidden(self, batch: DecodeBatch, cache: PrefixCache) -> Tensor:
        """``[B, D]``, in the order of the batch."""
        tables = batch.tables(cache)
        step, places = self._step(batch.adapters, *tables.table_BW.shape)
        x_BD = step.run(places, batch.tokens, tables.lengths, tables.table_BW)
        return x_BD[places]

    def _step(self, adapters: Sequence[Adapter | None], num_rows: int, num_pages: int) -> tuple[_Step, Tensor]:
        """A step that is large enough, told whose rows are whose, and the row of it that each row of the batch has."""
        slots = self._slots.place(adapters)
        if self._slots.generation != self._generation:
            self._steps.clear()
            self._generation = self._slots.generation
        num_slots = self._slots.num_slots if any(slots) else 0
        key = power_of_two(num_rows), power_of_two(num_pages), num_slots
        if key not in self._steps:
            while len(self._steps) >= _MAX_STEPS:
                self._steps.popitem(last=False)
            self._steps[key] = _Step(self._decoder, self._pages, self._slots, key)
        self._steps.move_to_end(key)
        step = self._steps[key]
        order = sorted(range(num_rows), key=slots.__getitem__)
        places = [0] * num_rows
        for place, row in enumerate(order, start=key[0] - num_rows):  # rows that nobody wants come first: slot 0
            places[row] = place
        counts = [slots.count(slot) for slot in range(num_slots)]
        if counts:
            counts[0] += key[0] - num_rows
        scales = [1.0] * key[0]
        for row, adapter in enumerate(adapters):
            scales[places[row]] = 1.0 if adapter is None else adapter.spec.scale
        step.assign(list(accumulate(counts)), scales, self._pool)
        return step, to_device(places, self._decoder.device)


class _Step:
    """One shape: its inputs at fixed places, and the graph that reads them."""

    def __init__(self, decoder: Decoder, pages: KvPages, slots: AdapterSlots, sizes: tuple[int, int, int]) -> None:
        num_rows, num_pages, num_slots = sizes
        device = decoder.device
        self._decoder = decoder
        self._blank = pages.blank
        self._tokens_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._lengths_B = torch.ones(num_rows, dtype=torch.int64, device=device)
        self._table_BW = torch.full((num_rows, num_pages), pages.blank, device=device)
        self._attention = PaddedPagedAttention(pages.pages, self._table_BW, self._lengths_B)
        self._rows: SlotRows | None = None
        if num_slots:
            stops_S = torch.full((num_slots,), num_rows, dtype=torch.int32, device=device)
            scales_B1 = torch.ones(num_rows, 1, dtype=decoder.dtype, device=device)
            self._rows = SlotRows(slots, stops_S, scales_B1)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._x_BD: Tensor | None = None

    def assign(self, stops: Sequence[int], scales: Sequence[float], pool: Any) -> None:
        """Which rows are which slot's. Captures the step if it has not been."""
        if self._rows is not None:
            device = self._tokens_B.device
            self._rows.stops_S.copy_(to_device(stops, device, torch.int32))
            self._rows.scales_B1[:, 0] = to_device(scales, device, torch.float32)
        if pool is not None and self._graph is None:
            self._capture(pool)

    def run(self, places: Tensor, tokens: Sequence[int], lengths: Sequence[int], table_BW: Tensor) -> Tensor:
        """``[B, D]``, overwritten by the next step of any shape."""
        device = places.device
        self._tokens_B.zero_()
        self._lengths_B.fill_(1)
        self._table_BW.fill_(self._blank)
        self._tokens_B[places] = to_device(tokens, device)
        self._lengths_B[places] = to_device(lengths, device)
        self._table_BW[places, : table_BW.shape[1]] = table_BW
        if self._graph is not None:
            self._graph.replay()
        else:
            self._x_BD = self._compute()
        assert self._x_BD is not None
        return self._x_BD

    def _compute(self) -> Tensor:
        positions_B = self._lengths_B - 1
        return self._decoder.hidden(self._tokens_B, positions_B, self._attention, (), self._rows)

    def _capture(self, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first call must not be captured
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._x_BD = self._compute()
