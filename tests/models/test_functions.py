"""Every hand-written backward against autograd in float64, and rows that do not depend on their batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models.operators import each_ops
from tuft.models.functions import (
    MAX_PACKED_ROWS,
    AddRmsNorm,
    HeadRmsNorm,
    RotaryHeads,
    SwiGlu,
    base_product,
    packed_product,
    packed_weight,
)
from tuft.models.ops import Ops

H, G, d = 4, 2, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_function(ours: Callable[..., object], plain: Callable[..., object], *inputs: Tensor) -> None:
    """Outputs and gradients of ``ours`` in float32 are those of ``plain`` in float64."""

    def run(function: Callable[..., object], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [random(*out.shape, seed=number + 9).to(dtype) for number, out in enumerate(outputs)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

    for actual, expected in zip(run(ours, torch.float32), run(plain, torch.float64), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@each_ops
def test_add_rms_norm(ops: Ops) -> None:
    weight_D = random(40, seed=5)
    assert_same_function(
        lambda residual, update: AddRmsNorm.apply(ops, residual, update, weight_D, 1e-5),
        lambda residual, update: (residual + update, rms_norm(residual + update, weight_D, 1e-5)),
        random(7, 40),
        random(7, 40, seed=1),
    )


@each_ops
def test_the_first_norm_starts_the_residual_stream(ops: Ops) -> None:
    weight_D = random(40, seed=5)
    assert_same_function(
        lambda update: AddRmsNorm.apply(ops, None, update, weight_D, 1e-5),
        lambda update: (update, rms_norm(update, weight_D, 1e-5)),
        random(7, 40),
    )


@each_ops
def test_head_rms_norm(ops: Ops) -> None:
    weight_qkd = random(H + G, d, seed=5)

    def plain(qkv_TN: Tensor) -> Tensor:
        heads = qkv_TN.view(-1, H + 2 * G, d)
        return torch.cat([rms_norm(heads[:, : H + G], weight_qkd, 1e-6), heads[:, H + G :]], dim=1).flatten(1)

    assert_same_function(lambda qkv: HeadRmsNorm.apply(ops, qkv, weight_qkd, 1e-6), plain, random(7, (H + 2 * G) * d))


@each_ops
def test_rotary_heads(ops: Ops) -> None:
    angles_Th = random(7, d // 2, seed=5)
    cos_T1d, sin_T1h = torch.cat([angles_Th, angles_Th], 1).cos().unsqueeze(1), angles_Th.sin().unsqueeze(1)

    def plain(qkv_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv_TN.view(-1, H + 2 * G, d)
        first, second = heads[:, : H + G].chunk(2, dim=-1)
        cos, sin = angles_Th.double().cos().unsqueeze(1), angles_Th.double().sin().unsqueeze(1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return rotated[:, :H], rotated[:, H:], heads[:, H + G :]

    assert_same_function(
        lambda qkv: RotaryHeads.apply(ops, qkv, cos_T1d, sin_T1h, H, G), plain, random(7, (H + 2 * G) * d)
    )


@each_ops
def test_swiglu(ops: Ops) -> None:
    def plain(gate_up_TN: Tensor) -> Tensor:
        gate, up = gate_up_TN.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    assert_same_function(lambda gate_up: SwiGlu.apply(ops, gate_up), plain, random(7, 80))


@pytest.mark.parametrize("num_columns", [72, 100, 1536])
@pytest.mark.parametrize("num_rows", [1, 3, 17, 333, 511, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_ops
def test_a_row_of_swiglu_does_not_depend_on_the_other_rows(
    ops: Ops, dtype: torch.dtype, num_rows: int, num_columns: int
) -> None:
    all_rows = (3 * random(700, 2 * num_columns)).to(dtype).requires_grad_()
    dout = random(700, num_columns, seed=1).to(dtype)
    expected = SwiGlu.apply(ops, all_rows)
    (expected_gradient,) = torch.autograd.grad(expected, all_rows, dout)
    some_rows = all_rows[5 : 5 + num_rows].detach().clone().requires_grad_()
    actual = SwiGlu.apply(ops, some_rows)
    (gradient,) = torch.autograd.grad(actual, some_rows, dout[5 : 5 + num_rows])
    assert torch.equal(actual, expected[5 : 5 + num_rows])
    assert torch.equal(gradient, expected_gradient[5 : 5 + num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 9, 11, 12, 33, 257])
def test_a_row_of_a_base_product_does_not_depend_on_the_other_rows(num_rows: int, dtype: torch.dtype) -> None:
    x_TK, weight_NK = random(600, 576).to(dtype), random(960, 576, seed=1).to(dtype)
    expected = base_product(x_TK, weight_NK)
    assert torch.equal(base_product(x_TK[3 : 3 + num_rows], weight_NK), expected[3 : 3 + num_rows])
    back = base_product(expected, weight_NK.t())
    assert torch.equal(base_product(expected[3 : 3 + num_rows], weight_NK.t()), back[3 : 3 + num_rows])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, MAX_PACKED_ROWS])
@pytest.mark.parametrize("in_features", [64, 576, 1536])
def test_a_packed_product_has_the_bits_of_the_plain_one(num_rows: int, in_features: int) -> None:
    x_TK, weight_NK = random(num_rows, in_features).bfloat16(), random(5000, in_features, seed=1).bfloat16()
    packed = packed_weight(weight_NK)
    assert packed is not None
    assert torch.equal(packed_product(x_TK, packed), base_product(x_TK, weight_NK))
