"""Attention of single new tokens over keys and values that lie in pages, by torch's operators.

Rows whose sequences have as many pages are one batched product in float32; a matrix of it is then the same shape at the
same alignment however many rows there are, and gives the same bits.

Shape letters: ``B`` rows, ``W`` pages of the longest sequence, ``P`` pages of the pool, ``H`` query heads, ``G``
key-value heads, ``g`` = H / G, ``d`` channels of a head, ``L`` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    num_heads, d = q_BHd.shape[1:]
    keys = tables.pages[:, layer, 0].unflatten(2, (d, PAGE_TOKENS))
    values = tables.pages[:, layer, 1].unflatten(2, (PAGE_TOKENS, d))
    last_B = tables.lengths_B - 1
    page_B = tables.table_BW.gather(1, (last_B // PAGE_TOKENS)[:, None])[:, 0]
    keys[page_B, :, :, last_B % PAGE_TOKENS] = k_BGd
    values[page_B, :, last_B % PAGE_TOKENS] = v_BGd
    out_BHd = torch.empty(q_BHd.shape, dtype=q_BHd.dtype, device=q_BHd.device)
    for num_pages, rows in tables.alike():
        pages = tables.table_BW[rows, :num_pages]
        keys_BGdL = keys[pages].permute(0, 2, 3, 1, 4).flatten(3).float()
        values_BGLd = values[pages].permute(0, 2, 1, 3, 4).flatten(2, 3).float()
        q_BGgd = q_BHd[rows].float().mul_(d**-0.5).unflatten(1, (k_BGd.shape[1], -1))
        scores = torch.bmm(q_BGgd.flatten(0, 1), keys_BGdL.flatten(0, 1)).unflatten(0, (len(rows), -1))
        is_beyond_BL = torch.arange(scores.shape[3], device=scores.device) >= tables.lengths_B[rows, None]
        probs = torch.softmax(scores.masked_fill_(is_beyond_BL[:, None, None], -torch.inf), dim=-1)
        out = torch.bmm(probs.flatten(0, 1), values_BGLd.flatten(0, 1))
        out_BHd[rows] = out.view(len(rows), num_heads, d).to(q_BHd.dtype)
    return out_BHd
