"""``ops.Ops`` over the compiled kernels: float32 and bf16, CPU only. Importing it compiles or loads the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tuft.models.compiled_attention import CompiledAttention
from tuft.models.compiled_decoding import CompiledDecode
from tuft.models.compiled_lora import CompiledLora
from tuft.models.decoding import DecodeKernels
from tuft.models.kernels import head, rows
from tuft.models.kernels.native import double_bits
from tuft.models.ops import Pairs
from tuft.models.segments import LoraKernels
from tuft.models.tiled_attention import AttentionKernels


class CompiledOps:
    """Results differ from those of ``EagerOps`` in the last digits: in bf16 a result is rounded once, where torch's
    operators round between steps."""

    def __init__(self) -> None:
        self.decode: DecodeKernels | None = CompiledDecode()
        self.attention: AttentionKernels | None = CompiledAttention()
        self.lora: LoraKernels | None = CompiledLora()
        self.has_flash_attention = self.has_decode_graphs = False

    def add_rms_norm(
        self, residual_TD: Tensor | None, update_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, width = update_TD.shape
        update_TD = update_TD.contiguous()
        sum_TD, rstd_T1 = update_TD.new_empty((num_rows, width), dtype=torch.float32), torch.empty(num_rows, 1)
        normed_TD = torch.empty_like(update_TD)
        rows.add_rms_norm(
            num_rows * width,
            update_TD.element_size(),
            num_rows,
            width,
            double_bits(eps),
            0 if residual_TD is None else residual_TD.data_ptr(),
            update_TD.data_ptr(),
            weight_D.data_ptr(),
            sum_TD.data_ptr(),
            normed_TD.data_ptr(),
            rstd_T1.data_ptr(),
        )
        return sum_TD, normed_TD, rstd_T1

    def add_rms_norm_backward(
        self, residual_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None, dnormed_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_rows, width = residual_TD.shape
        dnormed_TD = dnormed_TD.contiguous()
        dx_TD = torch.empty_like(residual_TD)
        dupdate_TD = dx_TD if dnormed_TD.dtype == torch.float32 else torch.empty_like(dnormed_TD)
        rows.add_rms_norm_backward(
            num_rows * width,
            dnormed_TD.element_size(),
            num_rows,
            width,
            residual_TD.data_ptr(),
            rstd_T1.data_ptr(),
            weight_D.data_ptr(),
            0 if dresidual_TD is None else dresidual_TD.data_ptr(),
            dnormed_TD.data_ptr(),
            dx_TD.data_ptr(),
            dupdate_TD.data_ptr(),
        )
        return dx_TD, dupdate_TD

    def head_rms_norm(self, qkv_TN: Tensor, weight_qd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        num_rows, width = qkv_TN.shape
        out_TN, rstd_Tq1 = torch.empty_like(qkv_TN), torch.empty(num_rows, len(weight_qd), 1)
        rows.head_rms_norm(
            num_rows * width,
            qkv_TN.element_size(),
            num_rows,
            width // weight_qd.shape[1],
            *weight_qd.shape,
            double_bits(eps),
            qkv_TN.data_ptr(),
            weight_qd.data_ptr(),
            out_TN.data_ptr(),
            rstd_Tq1.data_ptr(),
        )
        return out_TN, rstd_Tq1

    def head_rms_norm_backward(self, qkv_TN: Tensor, rstd_Tq1: Tensor, weight_qd: Tensor, dout_TN: Tensor) -> Tensor:
        num_rows, width = qkv_TN.shape
        dout_TN = dout_TN.contiguous()
        dqkv_TN = torch.empty_like(dout_TN)
        rows.head_rms_norm_backward(
            num_rows * width,
            qkv_TN.element_size(),
            num_rows,
            width // weight_qd.shape[1],
            *weight_qd.shape,
            qkv_TN.data_ptr(),
            rstd_Tq1.data_ptr(),
            weight_qd.data_ptr(),
            dout_TN.data_ptr(),
            dqkv_TN.data_ptr(),
        )
        return dqkv_TN

    def rotary_heads(
        self, qkv_TN: Tensor, cos_T1d: Tensor, sin_T1h: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, head_dim = len(qkv_TN), cos_T1d.shape[-1]
        num_rotated = num_heads + num_kv_heads
        out_THd = torch.empty(num_rows, num_rotated + num_kv_heads, head_dim, dtype=qkv_TN.dtype)
        rows.rotary_heads(
            qkv_TN.numel(),
            qkv_TN.element_size(),
            num_rows,
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_TN.data_ptr(),
            cos_T1d.data_ptr(),
            sin_T1h.data_ptr(),
            out_THd.data_ptr(),
        )
        return out_THd[:, :num_heads], out_THd[:, num_heads:num_rotated], out_THd[:, num_rotated:]

    def rotary_heads_backward(
        self, dq_THd: Tensor, dk_TGd: Tensor, dv_TGd: Tensor, cos_T1d: Tensor, sin_T1h: Tensor
    ) -> Tensor:
        num_rows, num_heads, head_dim = dq_THd.shape
        num_kv_heads = dk_TGd.shape[1]
        dqkv_TN = dq_THd.new_empty((num_rows, (num_heads + 2 * num_kv_heads) * head_dim))
        rows.rotary_heads_backward(
            dqkv_TN.numel(),
            dqkv_TN.element_size(),
            num_rows,
            num_heads,
            num_kv_heads,
            head_dim,
            cos_T1d.data_ptr(),
            sin_T1h.data_ptr(),
            dq_THd.data_ptr(),
            dq_THd.stride(0),
            dk_TGd.data_ptr(),
            dk_TGd.stride(0),
            dv_TGd.data_ptr(),
            dv_TGd.stride(0),
            dqkv_TN.data_ptr(),
        )
        return dqkv_TN

    def swiglu(self, gate_up_TN: Tensor) -> Tensor:
        num_rows, width = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
        out_TI = gate_up_TN.new_empty((num_rows, width))
        rows.swiglu(
            gate_up_TN.numel(),
            gate_up_TN.element_size(),
            num_rows,
            width,
            gate_up_TN.data_ptr(),
            out_TI.data_ptr(),
        )
        return out_TI

    def swiglu_backward(self, gate_up_TN: Tensor, dout_TI: Tensor) -> Tensor:
        num_rows, width = dout_TI.shape
        dout_TI = dout_TI.contiguous()
        dgate_up_TN = torch.empty_like(gate_up_TN)
        rows.swiglu_backward(
            gate_up_TN.numel(),
            gate_up_TN.element_size(),
            num_rows,
            width,
            gate_up_TN.data_ptr(),
            dout_TI.data_ptr(),
            dgate_up_TN.data_ptr(),
        )
        return dgate_up_TN

    def argmax(self, logits_NV: Tensor) -> Tensor:
        tokens_N = torch.empty(len(logits_NV), dtype=torch.int64)
        head.argmax(
            logits_NV.numel(), logits_NV.element_size(), *logits_NV.shape, logits_NV.data_ptr(), tokens_N.data_ptr()
        )
        return tokens_N

    def log_sum_exp(self, logits_NV: Tensor, exact: Pairs) -> tuple[Tensor, Tensor]:
        sums_N2 = torch.empty(len(logits_NV), 2)
        head.log_sum_exp(
            logits_NV.numel(),
            logits_NV.element_size(),
            *logits_NV.shape,
            logits_NV.data_ptr(),
            *_addresses(exact),
            sums_N2.data_ptr(),
        )
        return sums_N2, logits_NV

    def logits_backward(
        self, kept_NV: Tensor, sums_N2: Tensor, exact: Pairs, gradients: Pairs, active_A: Tensor
    ) -> Tensor:
        dlogits_AV = kept_NV.new_empty((len(active_A), kept_NV.shape[1]))
        head.logits_backward(
            dlogits_AV.numel(),
            kept_NV.element_size(),
            *dlogits_AV.shape,
            kept_NV.data_ptr(),
            sums_N2.data_ptr(),
            active_A.data_ptr(),
            *_addresses(exact),
            *_addresses(gradients),
            dlogits_AV.data_ptr(),
        )
        return dlogits_AV


def _addresses(pairs: Pairs) -> tuple[int, int, int, int]:
    return len(pairs.rows_M), pairs.rows_M.data_ptr(), pairs.tokens_M.data_ptr(), pairs.values_M.data_ptr()
