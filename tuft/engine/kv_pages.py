"""Keys and values of everything being sampled, in pages of 16 positions out of one pool.

A page belongs to one owner, a chunk of a prompt or a continuation, and holds all layers of its positions. Memory is
reserved once and, on a CPU, committed by the system as it is written: freed pages are the first to be used again.

Shape letters: ``P`` pages, ``L`` positions or rows, ``G`` key-value heads, ``d`` channels of a head, ``X`` = 16 * d.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tuft.models.architecture import DecoderConfig
from tuft.models.paged_attention import PAGE_TOKENS


def num_pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


class KvPages:
    """The pool. ``pages``: keys ``[d, 16]`` and values ``[16, d]`` of each head, ``[P, layers, 2, G, 16 * d]``.
    ``blank`` is one more page, of finite numbers, that nobody owns: where tables are wider than a sequence is long."""

    def __init__(self, config: DecoderConfig, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = (config.num_layers, 2, config.num_kv_heads)
        self.pages = torch.empty(num_pages + 1, *heads, PAGE_TOKENS * config.head_dim, dtype=dtype, device=device)
        self.blank = num_pages
        self.clear(self.blank)
        self._head_dim = config.head_dim
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free pages; there are that many."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def clear(self, page: int) -> None:
        """A page that is written position by position: the rest is multiplied by probability 0, which must not meet a
        stray NaN."""
        self.pages[page].zero_()

    def copy(self, source: int, target: int) -> None:
        self.pages[target] = self.pages[source]

    def write(self, layer: int, pages_P: Tensor, rows: Tensor, k_LGd: Tensor, v_LGd: Tensor) -> None:
        """Whole pages of one layer: ``rows`` ``[P * 16]`` says which of the L rows each position is; L means none."""
        for part, x_LGd in ((0, k_LGd), (1, v_LGd)):
            x_LGd = torch.cat([x_LGd, x_LGd.new_zeros(1, *x_LGd.shape[1:])])
            x = x_LGd.index_select(0, rows).unflatten(0, (-1, PAGE_TOKENS))  # [P, 16, G, d]
            order = (0, 2, 3, 1) if part == 0 else (0, 2, 1, 3)
            self.pages[:, layer, part].index_copy_(0, pages_P, x.permute(order).flatten(2))

    def read(self, layer: int, pages_P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[P * 16, G, d]`` of one layer, in order of position."""
        keys = self.pages[:, layer, 0].index_select(0, pages_P).unflatten(2, (self._head_dim, PAGE_TOKENS))
        values = self.pages[:, layer, 1].index_select(0, pages_P).unflatten(2, (PAGE_TOKENS, self._head_dim))
        return keys.permute(0, 3, 1, 2).flatten(0, 1), values.permute(0, 2, 1, 3).flatten(0, 1)


def page_rows(lengths: Sequence[int]) -> list[int]:
    """For chunks of ``lengths`` rows, end to end, each beginning a page: the row at each position of their pages; where
    a last page is not full, the number of all rows."""
    rows: list[int] = []
    total, start = sum(lengths), 0
    for length in lengths:
        rows += [*range(start, start + length), *[total] * (-length % PAGE_TOKENS)]
        start += length
    return rows
