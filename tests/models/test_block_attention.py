"""Attention over trees of shared prefixes, by blocks, tiles and torch's kernels, against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU
from tests.models.operators import COMPILED
from tuft.models.block_attention import kernel_attention
from tuft.models.branches import Branch
from tuft.models.flash_attention import FlashPackedAttention
from tuft.models.packed import PackedAttention, TiledPackedAttention

H, G, d = 6, 2, 32
LONG_PREFIX = [
    Branch(0, 700),
    Branch(700, 730, ((0, 690),)),
    Branch(730, 731, ((0, 690),)),
    Branch(731, 800, ((0, 690),)),
]
THREE_LEVELS = [
    Branch(0, 60),
    Branch(60, 100, ((0, 50),)),
    Branch(100, 101, ((0, 50), (60, 95))),
    Branch(101, 140, ((0, 50), (60, 95))),
    Branch(140, 180, ((0, 50), (60, 70))),
    Branch(180, 182),
    Branch(182, 200, ((0, 50),)),
]
ONE_AFTER_ANOTHER = [Branch(0, 40), Branch(40, 300, ((0, 40),)), Branch(300, 345, ((0, 290),))]
TREES = {"long prefix": LONG_PREFIX, "three levels": THREE_LEVELS, "one after another": ONE_AFTER_ANOTHER}


def random(num_rows: int, num_heads: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_heads, d, generator=generator).to(dtype)


def definition(branches: Sequence[Branch], q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Every branch by itself, over the rows of its path."""
    contexts = []
    for branch in branches:
        path = torch.cat([torch.arange(*span) for span in (*branch.prefix, (branch.start, branch.stop))])
        k, v = (x[path].repeat_interleave(H // G, dim=1) for x in (k_TGd, v_TGd))
        scores = torch.einsum("qhd,khd->hqk", q_THd[branch.start : branch.stop], k) * d**-0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(path) - branch.stop + branch.start)
        contexts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(contexts)


def by_blocks(branches: Sequence[Branch], q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    return PackedAttention(branches, CPU).attend(0, q_THd, k_TGd, v_TGd)


def by_tiles(branches: Sequence[Branch], q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    return TiledPackedAttention(branches, COMPILED.attention).attend(0, q_THd, k_TGd, v_TGd)


def by_flash(branches: Sequence[Branch], q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    return FlashPackedAttention(branches, CPU).attend(0, q_THd, k_TGd, v_TGd)


def by_kernels(branches: Sequence[Branch], q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """As on a GPU: PackedAttention takes this way for any device but the CPU."""
    return kernel_attention(q_THd, k_TGd, v_TGd, PackedAttention(branches, CPU).groups)


def with_gradients(
    attention: Callable[..., Tensor], branches: Sequence[Branch], inputs: Sequence[Tensor], dout: Tensor
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(branches, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("attention", [by_blocks, by_tiles, by_flash, by_kernels])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_a_branch_attends_to_its_prefix_and_itself(
    dtype: torch.dtype, tolerance: float, tree: str, attention: Callable[..., Tensor]
) -> None:
    branches = TREES[tree]
    inputs = [random(branches[-1].stop, heads, seed, dtype) for seed, heads in enumerate((H, G, G))]
    dout = random(branches[-1].stop, H, 9, dtype)
    actual = with_gradients(attention, branches, inputs, dout)
    expected = with_gradients(definition, branches, [x.double() for x in inputs], dout)
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("attention", [by_blocks, by_tiles, by_flash])
def test_a_tree_is_bit_equal_beside_others(attention: Callable[..., Tensor], tree: str, dtype: torch.dtype) -> None:
    def moved(branch: Branch, by: int) -> Branch:
        prefix = tuple((start + by, stop + by) for start, stop in branch.prefix)
        return Branch(branch.start + by, branch.stop + by, prefix)

    branches = TREES[tree]
    first, T = 187, branches[-1].stop
    copy = [moved(branch, first + T) for branch in branches]
    fused = [Branch(0, 60), Branch(60, first), *(moved(branch, first) for branch in branches), *copy]
    inputs = [random(first + 2 * T, heads, seed, dtype) for seed, heads in enumerate((H, G, G))]
    dout = random(first + 2 * T, H, 9, dtype)
    together = with_gradients(attention, fused, inputs, dout)
    rows = slice(first, first + T)
    alone = with_gradients(attention, branches, [x[rows] for x in inputs], dout[rows])
    assert all(torch.equal(expected, actual[rows]) for expected, actual in zip(alone, together, strict=True))


def test_the_groups_hold_every_row_once() -> None:
    for branches in TREES.values():
        rows = []
        for group in PackedAttention(branches, CPU).groups:
            rows += group.rows.tolist() if isinstance(group.rows, Tensor) else list(range(*group.rows))
        assert np.array_equal(np.sort(rows), np.arange(branches[-1].stop))
