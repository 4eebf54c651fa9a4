"""The decoder's differentiable pieces: which operator of ``ops`` is the backward of which, and what it keeps.

Written out because autograd's own graph costs what a CPU has least of, passes over memory: a slice's backward fills a
full tensor with zeros, a cast or a sum of gradients is a pass each. Base weights are frozen, so no function returns a
gradient for them.

Shape letters: ``T`` packed rows, ``K`` in_features, ``N`` out_features, ``D`` residual channels, ``I`` MLP channels,
``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``h`` = d / 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.ops import Ops

MIN_ROWS = {torch.float32: 12, torch.bfloat16: 2}
"""On a CPU, products of fewer rows have other kernels; from here on a row's result does not depend on their number."""

MAX_PACKED_ROWS = 128
"""More rows are as fast in the plain product."""

_USUAL_PACKED_ROWS = 32
"""The number of rows that packed weights are ordered for."""


def base_product(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x_TK @ weight_NK.T + bias_N``; each row's result is bit-equal in whatever batch the row stands."""
    return F.linear(padded(x_TK), weight_NK, bias_N)[: x_TK.shape[0]]


def packed_weight(weight_NK: Tensor) -> Tensor | None:
    """A copy in the order in which oneDNN reads it, for products of few rows: 2 to 4 times faster, since nothing is
    reordered on every call. None where there is no such product."""
    if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, _USUAL_PACKED_ROWS)
    return packed


def packed_product(x_TK: Tensor, packed_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``base_product`` of a ``packed_weight``, bit-equal to it."""
    y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(padded(x_TK), packed_NK, bias_N, "none", [], "")
    return y_TN[: x_TK.shape[0]]


def padded(x_TK: Tensor) -> Tensor:
    missing = MIN_ROWS[x_TK.dtype] - x_TK.shape[0]
    return F.pad(x_TK, (0, 0, 0, missing)) if missing > 0 else x_TK


class AddRmsNorm(torch.autograd.Function):
    """``residual = residual + update`` and ``normed = residual / rms(residual) * weight``.

    The residual stream is float32, ``update_TD`` and ``normed_TD`` have the compute dtype. ``residual_TD`` None starts
    the stream.
    """

    @staticmethod
    def forward(
        ctx: Any, ops: Ops, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.ops, ctx.starts = ops, residual_TD is None
        residual_TD, normed_TD, rstd_T1 = ops.add_rms_norm(residual_TD, update_TD, weight_D, eps)
        ctx.save_for_backward(residual_TD, rstd_T1, weight_D)
        return residual_TD, normed_TD

    @staticmethod
    def backward(ctx: Any, dresidual_TD: Tensor | None, dnormed_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        residual_TD, rstd_T1, weight_D = ctx.saved_tensors
        assert dnormed_TD is not None  # every layer reads its normed input
        dx_TD, dupdate_TD = ctx.ops.add_rms_norm_backward(residual_TD, rstd_T1, weight_D, dresidual_TD, dnormed_TD)
        return None, None if ctx.starts else dx_TD, dupdate_TD, None, None


class HeadRmsNorm(torch.autograd.Function):
    """RMS norm over each query and key head of ``qkv``; values pass unchanged (Qwen3). ``weight_qd``: the query's
    weight for the first H heads, the key's for the G after them."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, qkv_TN: Tensor, weight_qd: Tensor, eps: float) -> Tensor:
        out_TN, rstd_Tq1 = ops.head_rms_norm(qkv_TN, weight_qd, eps)
        ctx.ops = ops
        ctx.save_for_backward(qkv_TN, rstd_Tq1, weight_qd)
        return out_TN

    @staticmethod
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TN, rstd_Tq1, weight_qd = ctx.saved_tensors
        return None, ctx.ops.head_rms_norm_backward(qkv_TN, rstd_Tq1, weight_qd, dout_TN), None, None


class RotaryHeads(torch.autograd.Function):
    """Cut ``qkv`` into heads and rotate queries and keys by their position."""

    @staticmethod
    def forward(
        ctx: Any, ops: Ops, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ops = ops
        ctx.save_for_backward(cos_T1d, sin_T1h)
        return ops.rotary_heads(qkv_TN, cos_T1d, sin_T1h, num_heads, num_kv_heads)

    @staticmethod
    def backward(ctx: Any, dq_THd: Tensor, dk_TGd: Tensor, dv_TGd: Tensor) -> tuple[Tensor | None, ...]:
        dqkv_TN = ctx.ops.rotary_heads_backward(dq_THd, dk_TGd, dv_TGd, *ctx.saved_tensors)
        return None, dqkv_TN, None, None, None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate) * up`` of a fused ``[gate, up]``."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, gate_up_TN: Tensor) -> Tensor:
        ctx.ops = ops
        ctx.save_for_backward(gate_up_TN)
        return ops.swiglu(gate_up_TN)

    @staticmethod
    def backward(ctx: Any, dout_TI: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up_TN,) = ctx.saved_tensors
        return None, ctx.ops.swiglu_backward(gate_up_TN, dout_TI)


# --- the same, without autograd's bookkeeping where no gradient is wanted ---------------------------------------------


def add_rms_norm(
    ops: Ops, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        residual_TD, normed_TD = AddRmsNorm.apply(ops, residual_TD, update_TD, weight_D, eps)
    else:
        residual_TD, normed_TD, _ = ops.add_rms_norm(residual_TD, update_TD, weight_D, eps)
    return residual_TD, normed_TD


def head_rms_norm(ops: Ops, qkv_TN: Tensor, weight_qd: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        out_TN: Tensor = HeadRmsNorm.apply(ops, qkv_TN, weight_qd, eps)
        return out_TN
    return ops.head_rms_norm(qkv_TN, weight_qd, eps)[0]


def rotary_heads(
    ops: Ops, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled():
        q_THd, k_TGd, v_TGd = RotaryHeads.apply(ops, qkv_TN, cos_T1d, sin_T1h, num_heads, num_kv_heads)
        return q_THd, k_TGd, v_TGd
    return ops.rotary_heads(qkv_TN, cos_T1d, sin_T1h, num_heads, num_kv_heads)


def swiglu(ops: Ops, gate_up_TN: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        out_TI: Tensor = SwiGlu.apply(ops, gate_up_TN)
        return out_TI
    return ops.swiglu(gate_up_TN)
