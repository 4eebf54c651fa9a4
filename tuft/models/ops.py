"""The operators between the matrix products: norms, rotation, SwiGLU, softmax, each with its backward.

Plain tensors in, tensors out, no autograd: ``functions`` and ``head`` pair forward and backward.
``EagerOps`` computes with torch's operators on any device; ``compiled.CompiledOps`` on a CPU with kernels that pass
over memory once; ``accelerated.AcceleratedOps`` as suits a GPU. On a CPU all give a row the same bits in whatever
batch it stands.

Shape letters: ``T`` packed rows, ``N`` out_features, ``D`` residual channels, ``I`` MLP channels, ``H`` query heads,
``G`` key-value heads, ``d`` channels of a head, ``h`` = d / 2, ``q`` query and key heads; in the head ``N`` rows of a
chunk, ``A`` those with a gradient, ``V`` vocabulary, ``M`` (row, token) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from tuft.models.decoding import DecodeKernels
from tuft.models.segments import LoraKernels
from tuft.models.tiled_attention import AttentionKernels

_GRAIN_SIZE = 32_768
"""Elements up to which torch computes an elementwise function in one thread (at::internal::GRAIN_SIZE)."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Something about single logits of a chunk: ``values_M[i]``, float32, belongs to token ``tokens_M[i]`` of row
    ``rows_M[i]``. Sorted by row, then by token; a pair may come more than once."""

    rows_M: Tensor
    tokens_M: Tensor
    values_M: Tensor


class Ops(Protocol):
    """What a decoder needs beside matrix products. ``x`` and ``dx`` have the compute dtype, norm weights, statistics,
    rotation tables and the residual stream are float32. Inputs are contiguous unless a method says otherwise, and are
    not changed."""

    decode: DecodeKernels | None
    """Kernels for rows of one token each, where there are any; so with the next two."""

    lora: LoraKernels | None
    """For the adapters' products."""

    attention: AttentionKernels | None
    """For packed sequences."""

    has_flash_attention: bool
    """Whether packed sequences attend by torch's flash kernels, where these take them."""

    has_decode_graphs: bool
    """Whether decode steps have fixed shapes, to be captured once and replayed."""

    def add_rms_norm(
        self, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``residual + update`` (None: ``update`` alone), its RMS norm in the dtype of ``update_TD``, and 1 / rms
        ``[T, 1]``."""
        ...

    def add_rms_norm_backward(
        self, residual_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None, dnormed_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient of residual and update alike: in float32, and in the dtype of ``dnormed_TD``."""
        ...

    def head_rms_norm(self, qkv_TN: Tensor, weight_qd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMS norm of each query and key head, values as they are; and 1 / rms ``[T, q, 1]``."""
        ...

    def head_rms_norm_backward(self, qkv_TN: Tensor, rstd_Tq1: Tensor, weight_qd: Tensor, dout_TN: Tensor) -> Tensor:
        """dqkv."""
        ...

    def rotary_heads(
        self, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[T, H, d]`` and keys ``[T, G, d]``, rotated, and values ``[T, G, d]``. Pairs are (c, c + h); the
        halves of ``cos_T1d`` are equal."""
        ...

    def rotary_heads_backward(
        self, dq_THd: Tensor, dk_TGd: Tensor, dv_TGd: Tensor, cos_T1d: Tensor, sin_T1h: Tensor
    ) -> Tensor:
        """dqkv ``[T, N]``."""
        ...

    def swiglu(self, gate_up_TN: Tensor) -> Tensor:
        """``silu(gate) * up`` ``[T, I]`` of a fused ``[gate, up]``."""
        ...

    def swiglu_backward(self, gate_up_TN: Tensor, dout_TI: Tensor) -> Tensor:
        """``[dgate, dup]``."""
        ...

    def argmax(self, logits_NV: Tensor) -> Tensor:
        """Each row's largest logit; of equals, one that does not depend on other rows."""
        ...

    def log_sum_exp(self, logits_NV: Tensor, exact: Pairs) -> tuple[Tensor, Tensor]:
        """log(sum(exp(logits))) of each row, with the ``exact`` logits in place of their own, as two float32 to be
        added ``[N, 2]``: the largest, and the rest (in one number, what little a likely token lacks of 1 would be
        rounded away). And what ``logits_backward`` needs. ``logits_NV`` may be overwritten."""
        ...

    def logits_backward(
        self, kept_NV: Tensor, sums_N2: Tensor, exact: Pairs, gradients: Pairs, active_A: Tensor
    ) -> Tensor:
        """dlogits ``[A, V]``, in float32 or the dtype of the logits: the sum over a row's ``gradients`` g, all of exact
        logits, of g * (onehot - softmax). ``active_A``: the rows that have any, in order. ``kept_NV`` may be
        overwritten."""
        ...


class EagerOps:
    """torch's operators."""

    decode: DecodeKernels | None = None
    attention: AttentionKernels | None = None
    lora: LoraKernels | None = None
    has_flash_attention = False
    has_decode_graphs = False

    def add_rms_norm(
        self, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual_TD = update_TD.to(torch.float32, copy=True) if residual_TD is None else residual_TD + update_TD
        rms_T1 = torch.linalg.vector_norm(residual_TD, dim=-1, keepdim=True)
        rstd_T1 = rms_T1.square_().div_(residual_TD.shape[1]).add_(eps).rsqrt_()
        return residual_TD, (residual_TD * rstd_T1).mul_(weight_D).to(update_TD.dtype), rstd_T1

    def add_rms_norm_backward(
        self, residual_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None, dnormed_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        dscaled_TD = dnormed_TD * weight_D
        inner_T1 = torch.linalg.vecdot(dscaled_TD, residual_TD).unsqueeze(-1)
        inner_T1 = inner_T1.mul_(rstd_T1.pow(3)).div_(residual_TD.shape[1])
        dx_TD = dscaled_TD.mul_(rstd_T1).addcmul_(residual_TD, inner_T1, value=-1)
        if dresidual_TD is not None:
            dx_TD.add_(dresidual_TD)
        return dx_TD, dx_TD.to(dnormed_TD.dtype)

    def head_rms_norm(self, qkv_TN: Tensor, weight_qd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        split, head_dim = weight_qd.numel(), weight_qd.shape[1]
        heads_Tqd = qkv_TN[:, :split].unflatten(1, weight_qd.shape).float()
        rstd_Tq1 = torch.rsqrt(torch.linalg.vecdot(heads_Tqd, heads_Tqd).unsqueeze(-1).div_(head_dim).add_(eps))
        out_TN = torch.empty_like(qkv_TN)
        out_TN[:, :split].unflatten(1, weight_qd.shape).copy_((heads_Tqd * rstd_Tq1).mul_(weight_qd))
        out_TN[:, split:] = qkv_TN[:, split:]
        return out_TN, rstd_Tq1

    def head_rms_norm_backward(self, qkv_TN: Tensor, rstd_Tq1: Tensor, weight_qd: Tensor, dout_TN: Tensor) -> Tensor:
        split, head_dim = weight_qd.numel(), weight_qd.shape[1]
        heads_Tqd = qkv_TN[:, :split].unflatten(1, weight_qd.shape).float()
        dscaled_Tqd = dout_TN[:, :split].unflatten(1, weight_qd.shape) * weight_qd
        inner_Tq1 = torch.linalg.vecdot(dscaled_Tqd, heads_Tqd).unsqueeze(-1).mul_(rstd_Tq1.pow(3)).div_(head_dim)
        dheads_Tqd = dscaled_Tqd.mul_(rstd_Tq1).addcmul_(heads_Tqd, inner_Tq1, value=-1)
        dqkv_TN = torch.empty_like(dout_TN)
        dqkv_TN[:, :split].unflatten(1, weight_qd.shape).copy_(dheads_Tqd)
        dqkv_TN[:, split:] = dout_TN[:, split:]
        return dqkv_TN

    def rotary_heads(
        self, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv_TN.unflatten(1, (-1, cos_T1d.shape[-1]))
        rotated = _rotated(heads[:, : num_heads + num_kv_heads], cos_T1d, sin_T1h, sign=1).to(qkv_TN.dtype)
        return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :].clone()

    def rotary_heads_backward(
        self, dq_THd: Tensor, dk_TGd: Tensor, dv_TGd: Tensor, cos_T1d: Tensor, sin_T1h: Tensor
    ) -> Tensor:
        num_rows, num_heads, head_dim = dq_THd.shape
        num_kv_heads = dk_TGd.shape[1]
        dheads = dq_THd.new_empty((num_rows, num_heads + 2 * num_kv_heads, head_dim))
        dheads[:, :num_heads] = _rotated(dq_THd, cos_T1d, sin_T1h, sign=-1)
        dheads[:, num_heads : num_heads + num_kv_heads] = _rotated(dk_TGd, cos_T1d, sin_T1h, sign=-1)
        dheads[:, num_heads + num_kv_heads :] = dv_TGd
        return dheads.flatten(1)

    def swiglu(self, gate_up_TN: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up_TN.chunk(2, dim=1)
        out_TI = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
        blocks = _whole_row_blocks(gate_TI)
        for gate_tI, out_tI in zip(gate_TI.split(blocks), out_TI.split(blocks), strict=True):
            torch.ops.aten.silu.out(gate_tI, out=out_tI)
        return out_TI.mul_(up_TI)

    def swiglu_backward(self, gate_up_TN: Tensor, dout_TI: Tensor) -> Tensor:
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

    def argmax(self, logits_NV: Tensor) -> Tensor:
        # as argmax(dim=-1), five times as fast on a CPU: every block's maximum, then a look into the best block
        num_rows, width = logits_NV.shape
        blocks_NBb = logits_NV.view(num_rows, -1, gcd(width, 128))
        block_N = blocks_NBb.amax(dim=-1).argmax(dim=-1)
        best_Nb = blocks_NBb[torch.arange(num_rows, device=logits_NV.device), block_N]
        return block_N * best_Nb.shape[1] + best_Nb.argmax(dim=-1)

    def log_sum_exp(self, logits_NV: Tensor, exact: Pairs) -> tuple[Tensor, Tensor]:
        logits_NV = logits_NV.float()
        logits_NV[exact.rows_M, exact.tokens_M] = exact.values_M
        probs_NV = torch.softmax(logits_NV, dim=-1)
        # softmax adds one exponential after another: over a vocabulary its sum is wrong in the sixth digit
        probs_NV.div_(_row_sums(probs_NV))
        # A row's largest probability is exp(-rest), and never so small that its logarithm is imprecise.
        return torch.stack([logits_NV.amax(dim=-1), -probs_NV.amax(dim=-1).log()], dim=1), probs_NV

    def logits_backward(
        self,
        kept_NV: Tensor,
        sums_N2: Tensor,
        exact: Pairs,  # noqa: ARG002 (what is kept are probabilities, already of the exact logits)
        gradients: Pairs,
        active_A: Tensor,
    ) -> Tensor:
        total_N = torch.zeros_like(sums_N2[:, 0]).index_add_(0, gradients.rows_M, gradients.values_M)
        dlogits_AV = kept_NV if len(active_A) == len(kept_NV) else kept_NV[active_A]
        dlogits_AV.mul_(-total_N[active_A, None])
        places_M = torch.searchsorted(active_A, gradients.rows_M)
        return dlogits_AV.index_put_((places_M, gradients.tokens_M), gradients.values_M, accumulate=True)


def _row_sums(x_NV: Tensor) -> Tensor:
    """``[N, 1]``. torch sums a single row, if it is long, in as many parts as there are threads; never two rows."""
    if len(x_NV) == 1:
        return x_NV.expand(2, -1).sum(dim=-1, keepdim=True)[:1]
    return x_NV.sum(dim=-1, keepdim=True)


def _rotated(x_THd: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, sign: int) -> Tensor:
    """Rotate the pairs (channel, channel + d / 2) by the angle (``sign`` 1) or back (-1), in float32."""
    x_THd = x_THd.float()
    first, second = x_THd.chunk(2, dim=-1)
    out_THd = x_THd * cos_T1d
    out_first, out_second = out_THd.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_T1h, value=-sign)
    out_second.addcmul_(first, sin_T1h, value=sign)
    return out_THd


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
