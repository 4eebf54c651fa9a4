"""Attention of single new tokens over keys and values that lie in pages, by torch's operators.

On a CPU, rows whose sequences have as many pages are one batched product in float32; a matrix of it is then the same
shape at the same alignment however many rows there are, and gives the same bits.

Shape letters: ``B`` rows, ``W`` pages of the longest sequence, ``P`` pages of the pool, ``H`` query heads, ``G``
key-value heads, ``g`` = H / G, ``d`` channels of a head, ``L`` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tuft.models.flash_attention import flash_single_queries, flash_takes

PAGE_TOKENS = 16
"""Positions of a page: 64 bytes of float32, one cache line."""


@dataclass(slots=True)
class PageTables:
    """Where the sequences of B rows lie. ``pages``: the pool, ``[P, layers, 2, G, 16 * d]``, keys ``[d, 16]`` and
    values ``[16, d]``; what was never written of a page in use is finite. ``table_BW``: the pages of each row in order
    of position. ``lengths``: its positions, the new one included."""

    pages: Tensor
    table_BW: Tensor
    lengths: Sequence[int]
    lengths_B: Tensor
    _alike: list[tuple[int, Tensor]] = field(default_factory=list)

    def alike(self) -> list[tuple[int, Tensor]]:
        """Numbers of pages, and the rows that have as many."""
        if not self._alike:
            rows: dict[int, list[int]] = {}
            for row, length in enumerate(self.lengths):
                rows.setdefault(-(-length // PAGE_TOKENS), []).append(row)
            device = self.pages.device
            self._alike = [(count, torch.tensor(rows[count], device=device)) for count in sorted(rows)]
        return self._alike


def paged_attention(layer: int, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor, tables: PageTables) -> Tensor:
    """Write the new position's keys and values to their pages; contexts ``[B, H, d]``."""
    _write(layer, k_BGd, v_BGd, tables.pages, tables.table_BW, tables.lengths_B)
    out_BHd = torch.empty(q_BHd.shape, dtype=q_BHd.dtype, device=q_BHd.device)
    for num_pages, rows in tables.alike():
        table_BW = tables.table_BW[rows, :num_pages]
        out_BHd[rows] = _contexts(layer, q_BHd[rows], tables.pages, table_BW, tables.lengths_B[rows])
    return out_BHd


class PaddedPagedAttention:
    """``decoder.Attention`` of single new tokens whose shapes depend on those of its tensors alone: it can be captured.
    All rows attend over as many pages, and what lies beyond their ``lengths_B`` is masked."""

    def __init__(self, pages: Tensor, table_BW: Tensor, lengths_B: Tensor) -> None:
        self._pages, self._table_BW, self._lengths_B = pages, table_BW, lengths_B

    def attend(self, layer: int, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor) -> Tensor:
        """As ``paged_attention``."""
        _write(layer, k_BGd, v_BGd, self._pages, self._table_BW, self._lengths_B)
        return _contexts(layer, q_BHd, self._pages, self._table_BW, self._lengths_B)


def _write(layer: int, k_BGd: Tensor, v_BGd: Tensor, pages: Tensor, table_BW: Tensor, lengths_B: Tensor) -> None:
    keys, values = _layer_of(layer, pages, k_BGd.shape[2])
    last_B = lengths_B - 1
    page_B = table_BW.gather(1, (last_B // PAGE_TOKENS)[:, None])[:, 0]
    keys[page_B, :, :, last_B % PAGE_TOKENS] = k_BGd
    values[page_B, :, last_B % PAGE_TOKENS] = v_BGd


def _contexts(layer: int, q_BHd: Tensor, pages: Tensor, table_BW: Tensor, lengths_B: Tensor) -> Tensor:
    """Over the pages of ``table_BW``, all of which are read."""
    d = q_BHd.shape[2]
    keys, values = _layer_of(layer, pages, d)
    if q_BHd.device.type != "cpu" and flash_takes(q_BHd.dtype, d, q_BHd.device):
        k_BLGd = keys[table_BW].permute(0, 1, 4, 2, 3).flatten(1, 2)
        v_BLGd = values[table_BW].permute(0, 1, 3, 2, 4).flatten(1, 2)
        return flash_single_queries(q_BHd, k_BLGd, v_BLGd, lengths_B)
    keys_BGdL = keys[table_BW].permute(0, 2, 3, 1, 4).flatten(3).float()
    values_BGLd = values[table_BW].permute(0, 2, 1, 3, 4).flatten(2, 3).float()
    q_BGgd = q_BHd.float().mul_(d**-0.5).unflatten(1, (keys.shape[1], -1))
    scores = torch.bmm(q_BGgd.flatten(0, 1), keys_BGdL.flatten(0, 1)).unflatten(0, (len(q_BHd), -1))
    is_beyond_BL = torch.arange(scores.shape[3], device=scores.device) >= lengths_B[:, None]
    probs = torch.softmax(scores.masked_fill_(is_beyond_BL[:, None, None], -torch.inf), dim=-1)
    out = torch.bmm(probs.flatten(0, 1), values_BGLd.flatten(0, 1))
    return out.view(q_BHd.shape).to(q_BHd.dtype)


def _layer_of(layer: int, pages: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Keys ``[P, G, d, 16]`` and values ``[P, G, 16, d]``."""
    return pages[:, layer, 0].unflatten(2, (d, PAGE_TOKENS)), pages[:, layer, 1].unflatten(2, (PAGE_TOKENS, d))
