"""Attention over packed sequences: against plain attention, and no sequence sees another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU
from tuft.models.branches import Branch
from tuft.models.packed import PackedAttention

H, G, d = 6, 2, 32
LENGTHS = (5, 40, 1, 17, 40, 5, 2, 600, 129, 600)


def random(num_rows: int, num_heads: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_heads, d, generator=generator).to(dtype)


def whole(lengths: Sequence[int]) -> list[Branch]:
    return [Branch(stop - length, stop) for stop, length in zip(accumulate(lengths), lengths, strict=True)]


def packed(lengths: Sequence[int], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Contexts, and the gradients of queries, keys and values."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = PackedAttention(whole(lengths), CPU).attend(0, leaves[0], leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def plain(lengths: Sequence[int], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """The definition, one sequence at a time, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    contexts = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in leaves), strict=True):
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * d**-0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        contexts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    out = torch.cat(contexts)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_packed_attention_is_attention_of_each_sequence(dtype: torch.dtype, tolerance: float) -> None:
    T = sum(LENGTHS)
    inputs = [random(T, heads, seed, dtype) for seed, heads in enumerate((H, G, G))]
    dout = random(T, H, 9, dtype)
    for actual, expected in zip(packed(LENGTHS, inputs, dout), plain(LENGTHS, inputs, dout), strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_is_bit_equal_alone_and_packed(dtype: torch.dtype) -> None:
    T = sum(LENGTHS)
    inputs = [random(T, heads, seed, dtype) for seed, heads in enumerate((H, G, G))]
    dout = random(T, H, 9, dtype)
    together = [x.split(LENGTHS) for x in packed(LENGTHS, inputs, dout)]
    for number, length in enumerate(LENGTHS):
        alone = packed([length], [x.split(LENGTHS)[number] for x in inputs], dout.split(LENGTHS)[number])
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual, expected[number]), (number, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_one_sequence_stays_there(dtype: torch.dtype) -> None:
    lengths = (40, 17, 40)
    inputs = [random(97, heads, seed, dtype) for seed, heads in enumerate((H, G, G))]
    dout = random(97, H, 9, dtype)
    clean = packed(lengths, inputs, dout)
    inputs[1][40:57] = torch.nan
    for actual, expected in zip(packed(lengths, inputs, dout), clean, strict=True):
        assert actual[40:57].isnan().any()
        assert torch.equal(actual[:40], expected[:40])
        assert torch.equal(actual[57:], expected[57:])
