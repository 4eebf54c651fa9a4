"""Attention over pages, by torch and by kernels, against attention over everything at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.compiled_decoding import CompiledDecode
from tuft.models.paged_attention import PAGE_TOKENS, PageTables, paged_attention

Attend = Callable[[int, Tensor, Tensor, Tensor, PageTables], Tensor]
ATTEND: dict[str, Attend] = {"torch": paged_attention, "kernels": CompiledDecode().attend}
LAYER, LAYERS = 1, 3
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

each_way = pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Sequences:
    """Random keys and values of sequences of ``lengths``, all but the last position written to pages in any order."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, heads: tuple[int, int, int] = (6, 2, 16)) -> None:
        num_heads, num_kv_heads, d = heads
        generator = torch.Generator().manual_seed(len(lengths))
        counts = [-(-length // PAGE_TOKENS) for length in lengths]
        order = iter(np.random.default_rng(0).permutation(sum(counts) + 3).tolist())
        # beyond what was written a page in use is finite; pages that are not in use may hold anything
        self.pages = torch.full((sum(counts) + 3, LAYERS, 2, num_kv_heads, PAGE_TOKENS * d), torch.nan, dtype=dtype)
        self.lengths = lengths
        self.table = [[next(order) for _ in range(count)] for count in counts]
        self.q, self.k, self.v = (
            [torch.randn(length, count, d, generator=generator).to(dtype) for length in lengths]
            for count in (num_heads, num_kv_heads, num_kv_heads)
        )
        for pages, k, v in zip(self.table, self.k, self.v, strict=True):
            self.pages[pages] = 0
            for position in range(len(k) - 1):
                page, place = self.pages[pages[position // PAGE_TOKENS], LAYER], position % PAGE_TOKENS
                page[0].unflatten(1, (d, PAGE_TOKENS))[:, :, place] = k[position]
                page[1].unflatten(1, (PAGE_TOKENS, d))[:, place] = v[position]

    def context(self, attend: Attend, rows: list[int]) -> Tensor:
        """Of the last position of ``rows``, which is written by the way."""
        width = max(len(self.table[row]) for row in rows) + 1
        table = [self.table[row] + [0] * (width - len(self.table[row])) for row in rows]
        lengths = [self.lengths[row] for row in rows]
        tables = PageTables(self.pages, torch.tensor(table), lengths, torch.tensor(lengths))
        # queries, keys and values of a row lie side by side, as rotation leaves them
        qkv = torch.stack([torch.cat([x[row][-1] for x in (self.q, self.k, self.v)]) for row in rows])
        num_heads, num_kv_heads = self.q[0].shape[1], self.k[0].shape[1]
        q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return attend(LAYER, q, k, v, tables)

    def expected(self, row: int) -> Tensor:
        q, k, v = (x[row].double().transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)[0, :, 0]


@each_way
@each_dtype
@pytest.mark.parametrize("heads", [(6, 2, 16), (9, 3, 64), (4, 4, 8), (3, 1, 10), (2, 1, 128)])
def test_a_new_token_attends_to_its_whole_sequence(
    heads: tuple[int, int, int], dtype: torch.dtype, attend: Attend
) -> None:
    sequences = Sequences([1, 2, 15, 16, 17, 40, 200], dtype, heads)
    out = sequences.context(attend, list(range(7)))
    for row in range(7):
        torch.testing.assert_close(out[row].double(), sequences.expected(row), atol=TOLERANCE[dtype], rtol=0)


@each_way
@each_dtype
def test_the_new_key_and_value_are_kept(dtype: torch.dtype, attend: Attend) -> None:
    sequences = Sequences([20, 5], dtype)
    sequences.context(attend, [0, 1])
    for row, (page, place) in enumerate(((sequences.table[0][1], 3), (sequences.table[1][0], 4))):
        keys, values = sequences.pages[page, LAYER]
        assert torch.equal(keys.unflatten(1, (16, PAGE_TOKENS))[:, :, place], sequences.k[row][-1])
        assert torch.equal(values.unflatten(1, (PAGE_TOKENS, 16))[:, place], sequences.v[row][-1])


@each_way
@each_dtype
def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype, attend: Attend) -> None:
    lengths = [3, 33, 200, 41, 34, 16, 199, 5, 48, 35]
    sequences = Sequences(lengths, dtype, (9, 3, 64))
    together = sequences.context(attend, list(range(10)))
    for rows in ([0], [2], [1, 4], [9, 8, 6], [7, 5, 3, 2, 1, 0]):
        assert torch.equal(sequences.context(attend, rows), together[rows])


def test_one_thread_gives_the_bits_of_many() -> None:
    sequences = Sequences([100, 7, 60, 61, 300], torch.bfloat16, (9, 3, 64))
    num_threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(sequences.context(ATTEND["kernels"], list(range(5))))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@each_way
def test_a_nan_stays_in_its_row(attend: Attend) -> None:
    clean, broken = Sequences([20, 30, 40], torch.float32), Sequences([20, 30, 40], torch.float32)
    broken.q[1][-1, 2, 3] = torch.nan
    expected, out = clean.context(attend, [0, 1, 2]), broken.context(attend, [0, 1, 2])
    assert torch.isnan(out[1, 2]).all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
