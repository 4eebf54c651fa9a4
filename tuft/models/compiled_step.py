"""``decoding.DecodeStep`` over the compiled kernels: bf16, CPU only.

Shape letters: ``B`` rows, ``D`` residual channels, ``K`` in_features, ``N`` out_features, ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuft.models.architecture import DecoderConfig
from tuft.models.decoding import LoraTables, StepWeights
from tuft.models.kernels import decode_step as kernels
from tuft.models.kernels import panels
from tuft.models.kernels.native import double_bits
from tuft.models.lora import group_key
from tuft.models.paged_attention import PAGE_TOKENS, PageTables
from tuft.models.workspace import Workspace

_F32_BYTES = 4
_MOST_LINEARS = 3
"""Of a group: q, k and v."""


class CompiledStep:
    """The weights, packed, and workspaces that grow to the most rows, pages and ranks that were wanted."""

    def __init__(self, config: DecoderConfig, weights: StepWeights) -> None:
        self._config = config
        self._weights = weights
        self._packed = [[_panels(weight_NK) for weight_NK, _ in layer.linears] for layer in weights.layers]
        self._biases = [
            [None if bias_N is None else bias_N.float() for _, bias_N in layer.linears] for layer in weights.layers
        ]
        self._layers_L = torch.tensor(
            [
                [
                    *(packed.data_ptr() for packed in self._packed[index]),
                    *(0 if bias_N is None else bias_N.data_ptr() for bias_N in self._biases[index]),
                    layer.attention_norm_D.data_ptr(),
                    layer.mlp_norm_D.data_ptr(),
                    0 if layer.head_norm_qd is None else layer.head_norm_qd.data_ptr(),
                ]
                for index, layer in enumerate(weights.layers)
            ]
        )
        assert self._layers_L.shape[1] == kernels.LAYER_ADDRESSES
        self._workspace = Workspace()

    @staticmethod
    def takes(config: DecoderConfig, dtype: torch.dtype) -> bool:
        """Whether all sizes fill whole vectors."""
        d = config.head_dim
        widths = (config.hidden_size, config.num_heads * d, config.num_kv_heads * d, config.intermediate_size)
        return dtype == torch.bfloat16 and d % PAGE_TOKENS == 0 and all(width % panels.PANEL == 0 for width in widths)

    def hidden(self, tokens: Sequence[int], tables: PageTables, lora: LoraTables | None) -> Tensor:
        config, num_rows = self._config, len(tokens)
        H, G, d = config.num_heads, config.num_kv_heads, config.head_dim
        D, I, max_pages = config.hidden_size, config.intermediate_size, tables.table_BW.shape[1]
        max_rank = 0 if lora is None else lora.max_rank
        padded = -(-num_rows // panels.MAX_ROWS) * panels.MAX_ROWS
        tokens_B = torch.tensor(tokens)
        out_BD = torch.empty(padded, D, dtype=torch.bfloat16)
        sizes = [
            padded * D * _F32_BYTES,
            num_rows * _MOST_LINEARS * max_rank * _F32_BYTES,
            torch.get_num_threads() * (d + max_pages * PAGE_TOKENS) * _F32_BYTES,
            *(padded * width * 2 for width in ((H + 2 * G) * d, H * d, D, 2 * I, I)),
        ]
        residual, h, scores, *others = self._workspace.parts(sizes)
        counter = torch.zeros(1, dtype=torch.int64)
        table_BW = tables.table_BW.contiguous()
        kernels.decode_step(
            num_rows * self._weights.num_parameters,
            config.num_layers,
            num_rows,
            D,
            H,
            G,
            d,
            I,
            double_bits(config.rms_norm_eps),
            self._layers_L.data_ptr(),
            self._weights.final_norm_D.data_ptr(),
            self._weights.embed_VD.data_ptr(),
            tokens_B.data_ptr(),
            tables.lengths_B.data_ptr(),
            table_BW.data_ptr(),
            max_pages,
            tables.pages.data_ptr(),
            tables.pages.stride(0) * tables.pages.element_size(),
            self._weights.cos_Cd.data_ptr(),
            self._weights.sin_Ch.data_ptr(),
            0 if lora is None else lora.addresses(group_key(0, "qkv"))[0],
            max_rank,
            0 if lora is None else lora.ranks_B.data_ptr(),
            0 if lora is None else lora.scales_B.data_ptr(),
            counter.data_ptr(),
            residual,
            h,
            scores,
            out_BD.data_ptr(),
            *others,
        )
        return out_BD[:num_rows]


def _panels(weight_NK: Tensor) -> Tensor:
    """``[N / 32, K / 2, 32, 2]``: of 32 columns, pair by pair along K."""
    columns: Tensor = weight_NK.unflatten(0, (-1, panels.PANEL)).unflatten(2, (-1, 2))
    return columns.transpose(1, 2).contiguous()
