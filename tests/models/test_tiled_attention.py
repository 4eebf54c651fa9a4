"""Attention by tiles: every size of head and sequence, and what is where in its tables. Trees: test_block_attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.operators import COMPILED
from tuft.models.tiled_attention import TiledAttention, TileTables

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def tables(lengths: list[int]) -> TileTables:
    stops = torch.tensor(lengths).cumsum(0).tolist()
    return TileTables.of([[(stop - length, stop)] for length, stop in zip(lengths, stops, strict=True)])


def random_heads(num_rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as rotary_heads gives them, one behind the other in each row; and dout."""
    num_heads, num_kv_heads, d = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, d, generator=generator).to(dtype)
    dout = torch.randn(num_rows, num_heads, d, generator=generator).to(dtype)
    return list(qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)), dout


def attend(inputs: list[Tensor], dout: Tensor, lengths: list[int]) -> list[Tensor]:
    """Contexts, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = TiledAttention.apply(COMPILED.attention, *leaves, tables(lengths))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def definition(inputs: list[Tensor], dout: Tensor, lengths: list[int]) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    group = leaves[0].shape[1] // leaves[1].shape[1]
    contexts = []
    for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        contexts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    out = torch.cat(contexts)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


@each_dtype
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.sampled_from([2, 8, 20, 64, 80, 128]),
)
def test_every_shape_attends_as_the_definition_says(
    dtype: torch.dtype, lengths: list[int], num_kv_heads: int, group: int, d: int
) -> None:
    inputs, dout = random_heads(sum(lengths), (num_kv_heads * group, num_kv_heads, d), dtype)
    actual, expected = attend(inputs, dout, lengths), definition(inputs, dout, lengths)
    size = max(float(x.norm()) for x in expected)  # one position's dq and dk are zero
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours.double() - exact).norm() <= MAX_ERROR[dtype] * max(float(exact.norm()), 0.2 * size)


@each_dtype
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=2, max_size=4), num_threads=st.integers(1, 3))
def test_a_sequence_is_bit_equal_beside_others_and_on_any_number_of_threads(
    dtype: torch.dtype, lengths: list[int], num_threads: int
) -> None:
    inputs, dout = random_heads(sum(lengths), (6, 2, 16), dtype)
    together = attend(inputs, dout, lengths)
    start, stop = sum(lengths[:-1]), sum(lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = attend([x[start:stop] for x in inputs], dout[start:stop], lengths[-1:])
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(alone, together, strict=True):
        assert torch.equal(ours, expected[start:stop])


@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible_and_in_its_sequence(dtype: torch.dtype, bad: float) -> None:
    lengths = [40, 70, 40]
    inputs, dout = random_heads(150, (6, 2, 16), dtype)
    clean = attend(inputs, dout, lengths)
    inputs[1][60, 0, 3] = bad
    for ours, expected in zip(attend(inputs, dout, lengths), clean, strict=True):
        assert not ours[40:110].isfinite().all()
        assert torch.equal(ours[:40], expected[:40])
        assert torch.equal(ours[110:], expected[110:])


def test_branches_that_share_rows_are_one_tree() -> None:
    found = TileTables.of([[(0, 100)], [(0, 90), (100, 110)], [(110, 120)], [(120, 121)], [(110, 115), (121, 200)]])
    assert found.tiles_N2.tolist()[:5] == [[0, 64], [64, 36], [0, 64], [64, 26], [100, 10]]
    assert found.branches_B4.tolist()[:2] == [[0, 100, 0, 0], [100, 110, 2, 4]]
    assert found.branch_costs.tolist() == [0, 3, 6, 7, 8, 13]
    assert found.trees_R4.tolist() == [[0, 2, 0, 110], [2, 5, 110, 200]]
    assert found.tree_costs.tolist() == [0, 6, 13]
    assert (found.max_tiles, found.max_tree_rows) == (3, 110)
