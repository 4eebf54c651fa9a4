"""Kernels beside torch's operators: the same results but for the last digits, whatever the shape, and rows that do not
depend on their batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.operators import COMPILED, EAGER, each_ops
from tuft.models.ops import Ops, Pairs

FLOAT32_BOUND = 2e-6
BF16_BOUND = 6e-3
"""Relative to the norm of the result: torch's operators round to bf16 between steps, 2**-9 each time."""

Method = Callable[[Ops], tuple[Tensor | None, ...]]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
head_dims = st.sampled_from([2, 8, 20, 64, 128])


MAX_ROWS = 70


def random(num_rows: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first rows of the same shape and seed are the same."""
    return torch.randn(MAX_ROWS, *shape, generator=torch.Generator().manual_seed(seed))[:num_rows].to(dtype)


def methods(num_rows: int, width: int, head_dim: int, dtype: torch.dtype) -> dict[str, Method]:
    """Every operator of a layer on random inputs."""
    num_heads, num_kv_heads = 3, 1
    qkv_width = (num_heads + 2 * num_kv_heads) * head_dim
    residual, update = random(num_rows, width), random(num_rows, width, seed=1, dtype=dtype)
    weight, rstd = random(1, width, seed=2)[0], random(num_rows, 1, seed=3).abs()
    qkv, dqkv = (random(num_rows, qkv_width, seed=seed, dtype=dtype) for seed in (4, 5))
    head_weight, head_rstd = random(4, head_dim, seed=6), random(num_rows, 4, 1, seed=7).abs()
    angles = random(num_rows, 1, head_dim // 2, seed=8)
    cos, sin = torch.cat([angles, angles], -1).cos(), angles.sin()
    heads = dqkv.view(num_rows, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    gate_up, dout = 4 * random(num_rows, 2 * width, seed=9, dtype=dtype), random(num_rows, width, seed=10, dtype=dtype)
    return {
        "add_rms_norm": lambda ops: ops.add_rms_norm(residual, update, weight, 1e-5),
        "first add_rms_norm": lambda ops: ops.add_rms_norm(None, update, weight, 1e-5),
        "add_rms_norm_backward": lambda ops: ops.add_rms_norm_backward(residual, rstd, weight, residual, update),
        "last add_rms_norm_backward": lambda ops: ops.add_rms_norm_backward(residual, rstd, weight, None, update),
        "head_rms_norm": lambda ops: ops.head_rms_norm(qkv, head_weight, 1e-6),
        "head_rms_norm_backward": lambda ops: (ops.head_rms_norm_backward(qkv, head_rstd, head_weight, dqkv),),
        "rotary_heads": lambda ops: ops.rotary_heads(qkv, cos, sin, num_heads, num_kv_heads),
        "rotary_heads_backward": lambda ops: (ops.rotary_heads_backward(*heads, cos, sin),),
        "swiglu": lambda ops: (ops.swiglu(gate_up),),
        "swiglu_backward": lambda ops: (ops.swiglu_backward(gate_up, dout),),
    }


def assert_close(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert actual is not None
    assert expected is not None
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm()
    bound = FLOAT32_BOUND if dtype == torch.float32 else BF16_BOUND
    assert error <= bound * expected.double().norm() + 1e-30


@each_dtype
@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, MAX_ROWS), width=st.integers(1, 700), head_dim=head_dims)
def test_kernels_agree_with_torch(dtype: torch.dtype, num_rows: int, width: int, head_dim: int) -> None:
    for method in methods(num_rows, width, head_dim, dtype).values():
        for actual, expected in zip(method(COMPILED), method(EAGER), strict=True):
            assert_close(actual, expected, dtype)


@each_dtype
@pytest.mark.parametrize("name", methods(1, 2, 2, torch.float32))
def test_a_row_is_bit_equal_beside_others_and_on_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """60 rows are more than one thread computes alone."""
    together = methods(60, 576, 64, dtype)[name](COMPILED)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        elsewhere = methods(60, 576, 64, dtype)[name](COMPILED)
    finally:
        torch.set_num_threads(num_threads)
    alone = methods(1, 576, 64, dtype)[name](COMPILED)
    for all_rows, again, row in zip(together, elsewhere, alone, strict=True):
        assert all_rows is not None
        assert again is not None
        assert row is not None
        assert torch.equal(all_rows, again)
        assert torch.equal(all_rows[:1], row)


@each_ops
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(ops: Ops, dtype: torch.dtype, bad: float) -> None:
    x = random(3, 40, dtype=dtype)
    x[1, 7] = bad
    found = [
        ops.add_rms_norm(None, x, torch.ones(40), 1e-5)[1],
        ops.head_rms_norm(x, torch.ones(4, 8), 1e-5)[0],
        ops.rotary_heads(x, torch.ones(3, 1, 8), torch.zeros(3, 1, 4), 3, 1)[0],
        ops.swiglu(x),
    ]
    for out in found:
        assert not out[1].isfinite().all()
        assert out[0].isfinite().all()
        assert out[2].isfinite().all()


# --- the head ---------------------------------------------------------------------------------------------------------


def chunk(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Pairs, Pairs, Tensor]:
    """Logits, exact ones of each row's largest and of some targets, gradients of some of these (several of one token
    too), and the rows that have any."""
    generator = torch.Generator().manual_seed(seed)
    logits = (6 * torch.randn(num_rows, width, generator=generator)).to(dtype)
    rows, tokens = [], []
    for row in range(num_rows):
        count = int(torch.randint(0, 4, (1,), generator=generator))
        some = torch.randint(0, width, (count,), generator=generator).tolist()
        tokens += sorted([int(logits[row].argmax()), *some, *some[:1]])
        rows += [row] * (len(tokens) - len(rows))
    rows_M, tokens_M = torch.tensor(rows), torch.tensor(tokens)
    offset = 0.0 if dtype == torch.float32 else 0.02
    exact = Pairs(rows_M, tokens_M, logits[rows_M, tokens_M].float() + offset)
    has = torch.rand(len(rows), generator=generator) < 0.5
    gradients = Pairs(rows_M[has], tokens_M[has], torch.randn(int(has.sum()), generator=generator))
    return logits, exact, gradients, rows_M[has].unique()


def by(ops: Ops, logits: Tensor, exact: Pairs, gradients: Pairs, active: Tensor) -> tuple[Tensor, Tensor]:
    sums, kept = ops.log_sum_exp(logits.clone(), exact)
    return sums.sum(1), ops.logits_backward(kept, sums, exact, gradients, active).to(logits.dtype)


def definition(logits: Tensor, exact: Pairs, gradients: Pairs, active: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double()
    leaf[exact.rows_M, exact.tokens_M] = exact.values_M.double()
    leaf.requires_grad_()
    loss = (leaf.log_softmax(-1)[gradients.rows_M, gradients.tokens_M] * gradients.values_M).sum()
    return leaf.detach().logsumexp(-1), torch.autograd.grad(loss, leaf)[0][active]


@each_ops
@each_dtype
@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(1, 20), width=st.integers(2, 5000), seed=st.integers(0, 9))
def test_the_softmax_of_logits_is_that_of_the_definition(
    ops: Ops, dtype: torch.dtype, num_rows: int, width: int, seed: int
) -> None:
    given_chunk = chunk(num_rows, width, dtype, seed)
    lse, dlogits = by(ops, *given_chunk)
    expected_lse, expected = definition(*given_chunk)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=2e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(dlogits.double(), expected, rtol=tolerance, atol=1e-6)


@each_ops
@each_dtype
def test_the_largest_logit_is_found_and_rows_are_independent(ops: Ops, dtype: torch.dtype) -> None:
    logits, *others = chunk(40, 5000, dtype)
    tokens = ops.argmax(logits)
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(-1))
    assert torch.equal(ops.argmax(logits[7:8]), tokens[7:8])
    exact: Pairs = others[0]
    mine = exact.rows_M == 7
    alone = Pairs(exact.rows_M[mine] - 7, exact.tokens_M[mine], exact.values_M[mine])
    sums, _ = ops.log_sum_exp(logits.clone(), exact)
    assert torch.equal(ops.log_sum_exp(logits[7:8].clone(), alone)[0], sums[7:8])


@each_ops
@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_have_no_finite_sum(ops: Ops, dtype: torch.dtype, bad: float) -> None:
    logits, *_ = chunk(3, 500, dtype)
    logits[1, 7] = bad
    none = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    sums, _ = ops.log_sum_exp(logits, none)
    assert sums.sum(1).isfinite().tolist() == [True, False, True]
