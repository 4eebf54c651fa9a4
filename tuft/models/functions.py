"""The decoder's differentiable pieces, each with its backward written out.

Written out because autograd's own graph costs what a CPU has least of, passes over memory: a slice's backward fills a
full tensor with zeros, a cast or a sum of gradients is a pass each. Base weights are frozen, so no function returns a
gradient for them; LoRA gradients are added to the buffers that the segments bring along.

Shape letters: ``T`` packed rows, ``K`` in_features, ``N`` out_features, ``D`` residual channels, ``I`` MLP channels,
``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``h`` = d / 2, ``R`` LoRA rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.lora import LoraGroup, Segment

MIN_ROWS = {torch.float32: 12, torch.bfloat16: 2}
"""On a CPU, products of fewer rows have other kernels; from here on a row's result does not depend on their number."""

MAX_PACKED_ROWS = 32
"""More rows are as fast in the plain product."""

_GRAIN_SIZE = 32_768
"""Elements up to which torch computes an elementwise function in one thread (at::internal::GRAIN_SIZE)."""


def base_product(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x_TK @ weight_NK.T + bias_N``; each row's result is bit-equal in whatever batch the row stands."""
    return F.linear(_padded(x_TK), weight_NK, bias_N)[: x_TK.shape[0]]


def packed_weight(weight_NK: Tensor) -> Tensor | None:
    """A copy in the order in which oneDNN reads it, for products of few rows: 2 to 4 times faster, since nothing is
    reordered on every call. None where there is no such product."""
    if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, MAX_PACKED_ROWS)
    return packed


def packed_product(x_TK: Tensor, packed_NK: Tensor) -> Tensor:
    """``base_product`` of a ``packed_weight``, bit-equal to it."""
    y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x_TK), packed_NK, None, "none", [], "")
    return y_TN[: x_TK.shape[0]]


def _padded(x_TK: Tensor) -> Tensor:
    missing = MIN_ROWS[x_TK.dtype] - x_TK.shape[0]
    return F.pad(x_TK, (0, 0, 0, missing)) if missing > 0 else x_TK


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Rows ``start:stop`` that one adapter serves at one group of linears."""

    start: int
    stop: int
    scale: float
    group: LoraGroup
    gradients: LoraGroup | None


def lora_rows(segments: Sequence[Segment], key: str, dtype: torch.dtype) -> list[LoraRows]:
    """The segments whose adapter has the group ``key``, with its matrices in ``dtype``."""
    found = []
    for segment in segments:
        group = segment.adapter.views(dtype).get(key)
        if group is not None:
            gradients = segment.gradients[key] if segment.gradients is not None else None
            found.append(LoraRows(segment.start, segment.stop, segment.adapter.spec.scale, group, gradients))
    return found


def add_lora(y_TN: Tensor, x_TK: Tensor, rows: Sequence[LoraRows]) -> list[Tensor]:
    """Add every adapter's product to its rows of ``y_TN``, in place; returns ``scale * x @ A.T``, ``[t, R]`` each."""
    scaled = []
    for part in rows:
        h_tR = base_product(x_TK[part.start : part.stop], part.group.A_RK).mul_(part.scale)
        column = 0
        for h_tr, B_Nr in zip(h_tR.chunk(len(part.group.Bs_Nr), dim=1), part.group.Bs_Nr, strict=True):
            _add_product(y_TN[part.start : part.stop, column : column + B_Nr.shape[0]], h_tr, B_Nr)
            column += B_Nr.shape[0]
        scaled.append(h_tR)
    return scaled


def _add_product(y_tN: Tensor, h_tr: Tensor, B_Nr: Tensor) -> None:
    """``y += h @ B.T``, bit-equal for any number of rows. In bf16 it is so by itself: a rank is a short inner size."""
    if h_tr.dtype == torch.bfloat16 or h_tr.shape[0] >= MIN_ROWS[h_tr.dtype]:
        y_tN.addmm_(h_tr, B_Nr.t())
    else:
        y_tN.copy_(_padded(y_tN).addmm_(_padded(h_tr), B_Nr.t())[: y_tN.shape[0]])


def lora_backward(dy_TN: Tensor, x_TK: Tensor, dx_TK: Tensor, rows: Sequence[LoraRows], scaled: list[Tensor]) -> None:
    """The backward of ``add_lora``: adds to the rows' gradient buffers, and to ``dx_TK`` in place."""
    for part, h_tR in zip(rows, scaled, strict=True):
        Bs_Nr = part.group.Bs_Nr
        dys = dy_TN[part.start : part.stop].split([B_Nr.shape[0] for B_Nr in Bs_Nr], dim=1)
        dh_tR = torch.cat([dy_tN @ B_Nr for dy_tN, B_Nr in zip(dys, Bs_Nr, strict=True)], dim=1).mul_(part.scale)
        if part.gradients is not None:
            part.gradients.A_RK.add_(dh_tR.t() @ x_TK[part.start : part.stop])
            hs = h_tR.chunk(len(Bs_Nr), dim=1)
            for dB_Nr, dy_tN, h_tr in zip(part.gradients.Bs_Nr, dys, hs, strict=True):
                dB_Nr.t().add_(h_tr.t() @ dy_tN)
        dx_TK[part.start : part.stop].addmm_(dh_tR, part.group.A_RK)


class LoraLinear(torch.autograd.Function):
    """``y = x @ W.T + bias`` for all rows, plus each segment's low-rank product."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, rows: Sequence[LoraRows]) -> Tensor:
        y_TN = base_product(x_TK, weight_NK, bias_N)
        ctx.rows = rows
        ctx.save_for_backward(x_TK, weight_NK, *add_lora(y_TN, x_TK, rows))
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK, *scaled = ctx.saved_tensors
        dx_TK = base_product(dy_TN, weight_NK.t())
        lora_backward(dy_TN, x_TK, dx_TK, ctx.rows, scaled)
        return dx_TK, None, None, None


class AddRmsNorm(torch.autograd.Function):
    """``residual = residual + update`` and ``normed = residual / rms(residual) * weight``.

    The residual stream is float32, ``update_TD`` and ``normed_TD`` have the compute dtype. ``residual_TD`` None starts
    the stream.
    """

    @staticmethod
    def forward(
        ctx: Any, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.starts = residual_TD is None
        dtype = update_TD.dtype
        residual_TD = update_TD.to(torch.float32, copy=True) if residual_TD is None else residual_TD + update_TD
        rms_T1 = torch.linalg.vector_norm(residual_TD, dim=-1, keepdim=True)
        rstd_T1 = rms_T1.square_().div_(residual_TD.shape[1]).add_(eps).rsqrt_()
        normed_TD = (residual_TD * rstd_T1).mul_(weight_D).to(dtype)
        ctx.save_for_backward(residual_TD, rstd_T1, weight_D)
        return residual_TD, normed_TD

    @staticmethod
    def backward(
        ctx: Any, dresidual_TD: Tensor | None, dnormed_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        residual_TD, rstd_T1, weight_D = ctx.saved_tensors
        assert dnormed_TD is not None  # every layer reads its normed input
        dscaled_TD = dnormed_TD * weight_D
        inner_T1 = torch.linalg.vecdot(dscaled_TD, residual_TD).unsqueeze(-1)
        inner_T1 = inner_T1.mul_(rstd_T1.pow(3)).div_(residual_TD.shape[1])
        dx_TD = dscaled_TD.mul_(rstd_T1).addcmul_(residual_TD, inner_T1, value=-1)
        if dresidual_TD is not None:
            dx_TD.add_(dresidual_TD)
        return None if ctx.starts else dx_TD, dx_TD.to(dnormed_TD.dtype), None, None


class HeadRmsNorm(torch.autograd.Function):
    """RMS norm over each query and key head of ``qkv``; values pass unchanged (Qwen3). ``weight_qkd``: the query's
    weight for the first H heads, the key's for the G after them."""

    @staticmethod
    def forward(ctx: Any, qkv_TN: Tensor, weight_qkd: Tensor, eps: float) -> Tensor:
        num_heads, head_dim = weight_qkd.shape
        split = num_heads * head_dim
        heads = qkv_TN[:, :split].unflatten(1, (num_heads, head_dim)).float()
        rstd = torch.rsqrt(torch.linalg.vecdot(heads, heads).unsqueeze(-1).div_(head_dim).add_(eps))
        out_TN = torch.empty_like(qkv_TN)
        out_TN[:, :split].unflatten(1, (num_heads, head_dim)).copy_((heads * rstd).mul_(weight_qkd))
        out_TN[:, split:] = qkv_TN[:, split:]
        ctx.save_for_backward(qkv_TN, rstd, weight_qkd)
        return out_TN

    @staticmethod
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor, None, None]:
        qkv_TN, rstd, weight_qkd = ctx.saved_tensors
        num_heads, head_dim = weight_qkd.shape
        split = num_heads * head_dim
        heads = qkv_TN[:, :split].unflatten(1, (num_heads, head_dim)).float()
        dscaled = dout_TN[:, :split].unflatten(1, (num_heads, head_dim)) * weight_qkd
        inner = torch.linalg.vecdot(dscaled, heads).unsqueeze(-1).mul_(rstd.pow(3)).div_(head_dim)
        dqkv_TN = torch.empty_like(dout_TN)
        dheads = dscaled.mul_(rstd).addcmul_(heads, inner, value=-1)
        dqkv_TN[:, :split].unflatten(1, (num_heads, head_dim)).copy_(dheads)
        dqkv_TN[:, split:] = dout_TN[:, split:]
        return dqkv_TN, None, None


def _rotated(x_THd: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, sign: int) -> Tensor:
    """Rotate the pairs (channel, channel + d / 2) by the angle (``sign`` 1) or back (-1), in float32."""
    x_THd = x_THd.float()
    first, second = x_THd.chunk(2, dim=-1)
    out_THd = x_THd * cos_T1d
    out_first, out_second = out_THd.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_T1h, value=-sign)
    out_second.addcmul_(first, sin_T1h, value=sign)
    return out_THd


class RotaryHeads(torch.autograd.Function):
    """Cut ``qkv`` into heads and rotate queries and keys by their position."""

    @staticmethod
    def forward(
        ctx: Any, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = cos_T1d.shape[-1]
        heads = qkv_TN.unflatten(1, (-1, head_dim))
        rotated = _rotated(heads[:, : num_heads + num_kv_heads], cos_T1d, sin_T1h, sign=1).to(qkv_TN.dtype)
        ctx.save_for_backward(cos_T1d, sin_T1h)
        return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :].clone()

    @staticmethod
    def backward(ctx: Any, dq_THd: Tensor, dk_TGd: Tensor, dv_TGd: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos_T1d, sin_T1h = ctx.saved_tensors
        num_rows, num_heads, head_dim = dq_THd.shape
        num_kv_heads = dk_TGd.shape[1]
        dheads = dq_THd.new_empty((num_rows, num_heads + 2 * num_kv_heads, head_dim))
        dheads[:, :num_heads] = _rotated(dq_THd, cos_T1d, sin_T1h, sign=-1)
        dheads[:, num_heads : num_heads + num_kv_heads] = _rotated(dk_TGd, cos_T1d, sin_T1h, sign=-1)
        dheads[:, num_heads + num_kv_heads :] = dv_TGd
        return dheads.flatten(1), None, None, None, None


def _whole_row_blocks(x_TI: Tensor) -> list[int]:
    """Sizes of blocks of rows in which an elementwise function never cuts a row between two threads.

    torch cuts a CPU tensor into equal parts, one a thread, once it has more than ``_GRAIN_SIZE`` elements, and computes
    the last few elements of a part one by one: their exponentials differ in the last bit from vectorised ones. Cut at
    whole rows, a row's result does not depend on how many rows there are.
    """
    num_rows, num_columns = x_TI.shape
    num_threads = torch.get_num_threads()
    even_rows = num_rows - num_rows % num_threads
    if x_TI.device.type != "cpu" or num_rows * num_columns <= _GRAIN_SIZE:
        return [num_rows]
    if even_rows * num_columns > (num_threads - 1) * _GRAIN_SIZE:
        return [even_rows] + [1] * (num_rows - even_rows)
    block = max(1, _GRAIN_SIZE // num_columns)
    return [block] * (num_rows // block) + [num_rows % block] * (num_rows % block > 0)


class SwiGlu(torch.autograd.Function):
    """``silu(gate) * up`` of a fused ``[gate, up]``."""

    @staticmethod
    def forward(ctx: Any, gate_up_TN: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up_TN.chunk(2, dim=1)
        ctx.save_for_backward(gate_up_TN)
        out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
        blocks = _whole_row_blocks(gate_TI)
        for gate_tI, out_tI in zip(gate_TI.split(blocks), out_TI.split(blocks), strict=True):
            torch.ops.aten.silu.out(gate_tI, out=out_tI)
        return out_TI.mul_(up_TI)

    @staticmethod
    def backward(ctx: Any, dout_TI: Tensor) -> Tensor:
        (gate_up_TN,) = ctx.saved_tensors
        gate_TI, up_TI = gate_up_TN.chunk(2, dim=1)
        dgate_up_TN = torch.empty_like(gate_up_TN)
        dgate_TI, dup_TI = dgate_up_TN.chunk(2, dim=1)
        dsilu_TI = dout_TI * up_TI
        blocks = _whole_row_blocks(gate_TI)
        for gate_tI, dsilu_tI, dgate_tI, dup_tI in zip(
            *(x.split(blocks) for x in (gate_TI, dsilu_TI, dgate_TI, dup_TI)), strict=True
        ):
            torch.ops.aten.silu_backward.grad_input(dsilu_tI, gate_tI, grad_input=dgate_tI)
            torch.ops.aten.silu.out(gate_tI, out=dup_tI)
        dup_TI.mul_(dout_TI)
        return dgate_up_TN
