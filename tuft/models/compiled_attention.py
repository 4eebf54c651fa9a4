"""``tiled_attention.AttentionKernels`` over the compiled kernels: float32 and bf16, CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from tuft.models.kernels import attention, attention_backward
from tuft.models.kernels.native import double_bits
from tuft.models.kernels.products import TILE
from tuft.models.tiled_attention import TILE_ROWS, TileTables
from tuft.models.workspace import Workspace

assert TILE_ROWS == TILE


class CompiledAttention:
    def __init__(self) -> None:
        self._workspace = Workspace()

    def forward(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, tables: TileTables) -> tuple[Tensor, Tensor]:
        num_rows, num_heads, d = q_THd.shape
        out_THd, stats_TH2 = q_THd.new_empty(q_THd.shape), torch.empty(num_rows, num_heads, 2)
        *_, num_bytes = attention.forward_work(0, d, q_THd.element_size(), tables.max_tiles)
        attention.forward(
            _work(tables.branch_costs, num_heads, d),
            q_THd.element_size(),
            len(tables.branches_B4),
            *_given((q_THd, k_TGd, v_TGd), tables.branch_costs, tables),
            out_THd.data_ptr(),
            stats_TH2.data_ptr(),
            *self._workspace.of_threads(num_bytes),
        )
        return out_THd, stats_TH2

    def backward(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        out_THd: Tensor,
        stats_TH2: Tensor,
        dout_THd: Tensor,
        tables: TileTables,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, num_heads, d = out_THd.shape
        num_kv_heads, size = qkv[1].shape[1], out_THd.element_size()
        dout_THd = dout_THd.contiguous()
        dqkv = out_THd.new_empty((num_rows, num_heads + 2 * num_kv_heads, d))
        dq_THd, dk_TGd, dv_TGd = dqkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        *_, num_bytes = attention_backward.backward_work(0, d, size, tables.max_tiles, tables.max_tree_rows)
        attention_backward.backward(
            _work(tables.tree_costs, num_heads, d),
            size,
            len(tables.trees_R4),
            *_given(qkv, tables.tree_costs, tables),
            out_THd.data_ptr(),
            stats_TH2.data_ptr(),
            *self._workspace.of_threads(num_bytes),
            dout_THd.data_ptr(),
            dq_THd.data_ptr(),
            dqkv.stride(0) * size,
            dk_TGd.data_ptr(),
            dv_TGd.data_ptr(),
        )
        return dq_THd, dk_TGd, dv_TGd


def _work(costs: Tensor, num_heads: int, d: int) -> int:
    return int(costs[-1]) * num_heads * d * TILE_ROWS


def _given(qkv: tuple[Tensor, Tensor, Tensor], costs: Tensor, tables: TileTables) -> tuple[int, ...]:
    """What both kernels are told alike."""
    q_THd, k_TGd, _ = qkv
    size = q_THd.element_size()
    for x in qkv:
        assert x.stride()[1:] == (x.shape[2], 1)
    return (
        q_THd.shape[1],
        k_TGd.shape[1],
        q_THd.shape[2],
        double_bits(q_THd.shape[2] ** -0.5),
        tables.branches_B4.data_ptr(),
        costs.data_ptr(),
        tables.tiles_N2.data_ptr(),
        tables.trees_R4.data_ptr(),
        *(number for x in qkv for number in (x.data_ptr(), x.stride(0) * size)),
    )
