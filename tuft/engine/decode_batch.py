"""The continuations that are decoded together, and what of them changes only when one joins or leaves.

Shape letters: ``B`` continuations, ``W`` pages of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tuft.engine.kv_pages import KvPages
from tuft.engine.prefix_cache import PrefixCache
from tuft.engine.requests import Continuation
from tuft.models.decoding import DecodedRows, DecodeKernels, KernelRows, LoraTables, PackedAdapters
from tuft.models.paged_attention import PAGE_TOKENS, PageTables
from tuft.models.transfer import to_device


class DecodeBatch:
    """``continuations`` sorted by adapter: its matrices are then read once. ``lora`` and ``decoded``: the
    rows' adapters for kernels, if there are both."""

    def __init__(
        self,
        continuations: Sequence[Continuation],
        pages: KvPages,
        kernels: DecodeKernels | None,
        packed: PackedAdapters,
    ) -> None:
        self.continuations = sorted(continuations, key=lambda one: id(one.request.adapter))
        self.adapters = [one.request.adapter for one in self.continuations]
        self._pages = pages
        self.lora: LoraTables | None = None
        self.decoded: DecodedRows | None = None
        if kernels is not None and any(adapter is not None for adapter in self.adapters):
            self.lora = packed.tables(self.adapters)
            self.decoded = KernelRows(kernels, self.lora)
        in_use = [one.all_pages for one in self.continuations]
        width = max(
            (len(row) + one.num_reserved for row, one in zip(in_use, self.continuations, strict=True)), default=0
        )
        self._num_pages = [len(row) for row in in_use]
        table = [row + [pages.blank] * (width - len(row)) for row in in_use]
        self._table_BW = to_device(table, pages.pages.device, torch.int64)

    @property
    def tokens(self) -> list[int]:
        """The tokens to compute, one of each continuation."""
        return [one.tokens[-1] for one in self.continuations]

    def tables(self, cache: PrefixCache) -> PageTables:
        """Where the sequences lie, with a page for each new position; pages are taken from ``cache`` as they are
        needed, and were reserved."""
        lengths = [one.length for one in self.continuations]
        for row, (one, length) in enumerate(zip(self.continuations, lengths, strict=True)):
            if length > self._num_pages[row] * PAGE_TOKENS:
                (page,) = cache.take(1)
                self._pages.clear(page)
                one.pages.append(page)
                one.num_reserved -= 1
                self._table_BW[row, self._num_pages[row]] = page
                self._num_pages[row] += 1
        lengths_B = to_device(lengths, self._table_BW.device, torch.int64)
        return PageTables(self._pages.pages, self._table_BW, lengths, lengths_B)
