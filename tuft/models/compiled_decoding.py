"""``decoding.DecodeKernels`` over the compiled kernels. CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from tuft.models.architecture import DecoderConfig
from tuft.models.compiled_step import CompiledStep
from tuft.models.decoding import Draws, LoraTables, StepWeights
from tuft.models.kernels import draw, lora_rows, paged_attention
from tuft.models.kernels.native import double_bits
from tuft.models.kernels.vectors import LANES
from tuft.models.paged_attention import PAGE_TOKENS, PageTables
from tuft.models.workspace import Workspace

assert PAGE_TOKENS == LANES  # the scores of a page are one vector


class CompiledDecode:
    """bf16 and float32."""

    def __init__(self) -> None:
        self._workspace = Workspace()

    def step(self, config: DecoderConfig, weights: StepWeights) -> CompiledStep | None:
        return CompiledStep(config, weights) if CompiledStep.takes(config, weights.embed_VD.dtype) else None

    def attend(self, layer: int, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor, tables: PageTables) -> Tensor:
        num_rows, num_heads, d = q_BHd.shape
        num_kv_heads, size, pages = k_BGd.shape[1], q_BHd.element_size(), tables.pages
        max_pages = tables.table_BW.shape[1]
        out_BHd = torch.empty(num_rows, num_heads, d, dtype=q_BHd.dtype)
        work, _ = self._workspace.of_threads(4 * (num_heads // num_kv_heads * d + max_pages * PAGE_TOKENS))
        attend = paged_attention.attend_bf16 if q_BHd.dtype == torch.bfloat16 else paged_attention.attend_float32
        attend(
            sum(tables.lengths) * num_heads * d,
            num_rows,
            num_heads,
            num_kv_heads,
            d,
            max_pages,
            double_bits(d**-0.5),
            tables.table_BW.data_ptr(),
            tables.lengths_B.data_ptr(),
            work,
            q_BHd.data_ptr(),
            q_BHd.stride(0) * size,
            k_BGd.data_ptr(),
            k_BGd.stride(0) * size,
            v_BGd.data_ptr(),
            v_BGd.stride(0) * size,
            out_BHd.data_ptr(),
            pages.data_ptr() + layer * pages.stride(1) * size,
            pages.stride(0) * size,
        )
        return out_BHd

    def add_lora(self, y_BN: Tensor, x_BK: Tensor, lora: LoraTables, key: str) -> None:
        shape = lora.shapes[key]
        num_rows, size = len(lora.adapters), x_BK.element_size()
        address_A, address_B = lora.addresses(key)
        row_floats = shape.in_features + lora.max_rank
        add = lora_rows.add_bf16 if x_BK.dtype == torch.bfloat16 else lora_rows.add_float32
        add(
            0 if num_rows == 1 else num_rows * lora.max_rank * (x_BK.shape[1] + y_BN.shape[1]) // LANES,
            num_rows,
            shape.in_features,
            shape.num_linears,
            shape.out_features.data_ptr(),
            address_A,
            address_B,
            lora.ranks_B.data_ptr(),
            lora.scales_B.data_ptr(),
            x_BK.data_ptr(),
            x_BK.stride(0) * size,
            y_BN.data_ptr(),
            y_BN.stride(0) * size,
            self._workspace.of_threads(4 * row_floats)[0],
            row_floats,
        )

    def draw(
        self, logits_NV: Tensor, x_ND: Tensor, head_VD: Tensor, draws: Draws, lora: LoraTables
    ) -> tuple[Tensor, Tensor]:
        num_draws, (width, d) = len(draws.rows_N), head_VD.shape
        tokens_N, logprobs_N = torch.empty(num_draws, dtype=torch.int64), torch.empty(num_draws)
        num_blocks = -(-width // draw.BLOCK_TOKENS)
        work_bytes = 8 * num_blocks + 4 * num_blocks * draw.BLOCK_TOKENS + 4 * (d + d % 2)
        draw_rows = draw.draw_bf16 if logits_NV.dtype == torch.bfloat16 else draw.draw_float32
        draw_rows(
            0 if num_draws == 1 else num_draws * width,
            num_draws,
            width,
            d,
            draws.rows_N.data_ptr(),
            logits_NV.data_ptr(),
            x_ND.data_ptr(),
            draws.temperatures_N.data_ptr(),
            draws.uniforms_N.data_ptr(),
            *lora.exact_head,
            lora.ranks_B.data_ptr(),
            lora.scales_B.data_ptr(),
            tokens_N.data_ptr(),
            logprobs_N.data_ptr(),
            self._workspace.of_threads(work_bytes)[0],
            work_bytes,
            head_VD.data_ptr(),
            draws.top_ks_N.data_ptr(),
            draws.top_ps_N.data_ptr(),
        )
        return tokens_N, logprobs_N
