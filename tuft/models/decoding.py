"""Rows that are decoded, one token of a sequence each: what kernels made for them need beside the rows.

On a CPU such rows are limited by reading weights. So base weights are kept a second time in the order in which they are
read (``functions.packed_weight``). The adapters' matrices are found by their addresses, since the rows of one batch may
have as many adapters.

Shape letters: ``B`` rows, ``N`` draws, ``H`` query heads, ``G`` key-value heads, ``d`` channels of a head, ``K``
in_features, ``V`` vocabulary, ``D`` residual channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tuft.models.architecture import DecoderConfig
from tuft.models.lora import LM_HEAD, Adapter, LoraLayout
from tuft.models.paged_attention import PageTables
from tuft.types import Int64Array, LoraSpec


@dataclass(frozen=True, slots=True)
class Draws:
    """How tokens are drawn: ``rows_N`` int64, from which row of the logits; ``temperatures_N`` float32, 0 is greedy;
    ``uniforms_N`` float64 in [0, 1). ``top_ks_N`` int64, 0 or less is off; ``top_ps_N`` float64, 1 is off."""

    rows_N: Tensor
    temperatures_N: Tensor
    uniforms_N: Tensor
    top_ks_N: Tensor
    top_ps_N: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """``linears``: weight ``[N, K]`` and bias ``[N]`` of qkv, o, gate_up and down; norms in float32."""

    linears: Sequence[tuple[Tensor, Tensor | None]]
    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    head_norm_qd: Tensor | None


@dataclass(frozen=True, slots=True)
class StepWeights:
    """A decoder's frozen weights but for the head. ``cos_Cd`` and ``sin_Ch``: the rotation of every position."""

    embed_VD: Tensor
    layers: Sequence[LayerWeights]
    final_norm_D: Tensor
    cos_Cd: Tensor
    sin_Ch: Tensor

    @property
    def num_parameters(self) -> int:
        """Of the linears."""
        return sum(weight_NK.numel() for layer in self.layers for weight_NK, _ in layer.linears)


class DecodeStep(Protocol):
    """All layers of a step in one call."""

    def hidden(self, tokens: Sequence[int], tables: PageTables, lora: LoraTables | None) -> Tensor:
        """``x_BD`` after the final norm, having written the new positions' keys and values to their pages; a row's
        bits depend on nothing but the row."""
        ...


class DecodeKernels(Protocol):
    """Kernels for rows of one token each; a row's bits depend on nothing but the row."""

    def step(self, config: DecoderConfig, weights: StepWeights) -> DecodeStep | None:
        """Whole steps of a decoder, for which its weights are kept a second time; None if its sizes do not allow."""
        ...

    def attend(self, layer: int, q_BHd: Tensor, k_BGd: Tensor, v_BGd: Tensor, tables: PageTables) -> Tensor:
        """As ``paged_attention``. Of each tensor the rows may lie apart."""
        ...

    def add_lora(self, y_BN: Tensor, x_BK: Tensor, lora: LoraTables, key: str) -> None:
        """Every row's low-rank product at the group ``key``, added to ``y_BN`` in place."""
        ...

    def draw(
        self, logits_NV: Tensor, x_ND: Tensor, head_VD: Tensor, draws: Draws, lora: LoraTables
    ) -> tuple[Tensor, Tensor]:
        """Tokens (int64) and their logprobs (float32) under the temperature-scaled distribution; ``lora`` has one row a
        draw. If logits are rounded, the largest and the drawn token's are computed again from ``x_ND``."""
        ...


@dataclass(frozen=True, slots=True)
class LoraShape:
    """A group of linears: its number among the groups, in_features, and the out_features of each."""

    index: int
    in_features: int
    out_features: Tensor

    @property
    def num_linears(self) -> int:
        return len(self.out_features)


class _PackedAdapter:
    """One adapter's matrices for decoding: A as it is, B of each linear as ``[r, N]``, end to end for a group."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, LoraShape], dtype: torch.dtype) -> None:
        views = adapter.views(dtype)
        self.addresses: Int64Array = np.zeros((len(shapes), 2), dtype=np.int64)
        self.kept: list[Tensor] = []
        for key, group in views.items():
            B_rN = group.Bs_Nr[0].t()  # the others of the group follow it
            if not B_rN.is_contiguous():
                B_rN = B_rN.contiguous()
            self.kept += [group.A_RK, B_rN]
            self.addresses[shapes[key].index] = group.A_RK.data_ptr(), B_rN.data_ptr()
        self.exact_head: Int64Array = np.zeros(2, dtype=np.int64)
        exact = adapter.views(torch.float32).get(LM_HEAD)
        if exact is not None:
            self.exact_head[:] = exact.A_RK.data_ptr(), exact.Bs_Nr[0].data_ptr()


class PackedAdapters:
    """The packed matrices of adapters in use; they go with their adapter, which must not change any more."""

    def __init__(self, linear_shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        layout = LoraLayout(linear_shapes, LoraSpec(rank=1))
        self.shapes = {
            group.key: LoraShape(index, group.As[0].shape[1], torch.tensor([B.shape[0] for B in group.Bs]))
            for index, group in enumerate(layout.groups)
        }
        self._dtype = dtype
        self._packed: WeakKeyDictionary[Adapter, _PackedAdapter] = WeakKeyDictionary()
        self._last: LoraTables | None = None

    def __getitem__(self, adapter: Adapter) -> _PackedAdapter:
        packed = self._packed.get(adapter)
        if packed is None:
            packed = self._packed[adapter] = _PackedAdapter(adapter, self.shapes, self._dtype)
        return packed

    def tables(self, adapters: Sequence[Adapter | None]) -> LoraTables:
        """One row an adapter. The last tables are kept: most steps have the rows of the one before."""
        last = self._last
        if last is None or list(last.adapters) != list(adapters):
            last = self._last = LoraTables(adapters, self)
        return last

    def forget_tables(self) -> None:
        """Hold no adapter any longer."""
        self._last = None


class LoraTables:
    """Where the matrices of each row's adapter lie; address 0 is none."""

    def __init__(self, adapters: Sequence[Adapter | None], packed: PackedAdapters) -> None:
        self.shapes = packed.shapes
        self.adapters = adapters
        self._kept = [None if adapter is None else packed[adapter] for adapter in adapters]  # the addresses are theirs
        addresses = np.zeros((len(adapters), len(self.shapes), 2), dtype=np.int64)
        exact_head = np.zeros((len(adapters), 2), dtype=np.int64)
        for row, of_row in enumerate(self._kept):
            if of_row is not None:
                addresses[row], exact_head[row] = of_row.addresses, of_row.exact_head
        self._addresses = torch.from_numpy(np.ascontiguousarray(addresses.transpose(1, 2, 0)))
        self._exact_head = torch.from_numpy(np.ascontiguousarray(exact_head.T))
        ranks = [0 if adapter is None else adapter.spec.rank for adapter in adapters]
        self.ranks_B = torch.tensor(ranks, dtype=torch.int64)
        self.scales_B = torch.tensor([1.0 if adapter is None else adapter.spec.scale for adapter in adapters])
        self.max_rank = max(ranks, default=0)

    def addresses(self, key: str) -> tuple[int, int]:
        """Where the B addresses of A and those of B begin."""
        start = self._addresses.data_ptr() + self.shapes[key].index * 2 * len(self.adapters) * 8
        return start, start + len(self.adapters) * 8

    @property
    def exact_head(self) -> tuple[int, int]:
        """As ``addresses``, of the unembedding's float32 matrices A ``[r, K]`` and B ``[N, r]``."""
        return self._exact_head.data_ptr(), self._exact_head.data_ptr() + len(self.adapters) * 8


class DecodedRows(Protocol):
    """The first rows of a batch have each an adapter."""

    def add(self, y_BN: Tensor, x_BK: Tensor, key: str) -> None:
        """Every row's low-rank product at the group ``key``, added to ``y_BN`` in place."""
        ...


@dataclass(frozen=True, slots=True)
class KernelRows:
    """``DecodedRows`` by kernels: the adapters that ``lora`` says."""

    kernels: DecodeKernels
    lora: LoraTables

    def add(self, y_BN: Tensor, x_BK: Tensor, key: str) -> None:
        self.kernels.add_lora(y_BN, x_BK, self.lora, key)
