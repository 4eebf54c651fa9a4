"""Low-rank products by torch's grouped products: one call for all adapters of a rank and set of linears.

What suits a GPU, where a call costs as much as the product of many rows. Matrices of adapters that are alike lie side
by side: their flat buffers are stacked once a pass (``GroupedLora``), or stay stacked while they decode
(``adapter_slots``).

Shape letters: ``T`` packed rows, ``t`` those of neighbouring segments that are alike, ``K`` in_features, ``N``
out_features, ``S`` adapters side by side, ``P`` an adapter's parameters, ``R`` LoRA rows of a group of linears, ``r``
those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft.models.lora import Segment, StackedLora
from tuft.models.transfer import to_device

ALIGNED = 8
"""CUDA's grouped product reads rows that begin at multiples of 16 bytes: 8 numbers of bf16."""


def can_be_grouped(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of these sizes can: CUDA has no grouped product of float32."""
    return (dtype == torch.bfloat16 or device.type == "cpu") and all(size % ALIGNED == 0 for size in sizes)


def add_grouped(y_tN: Tensor, x_tK: Tensor, lora: StackedLora, stops_S: Tensor, scale: float | Tensor) -> Tensor:
    """Add every adapter's product to its rows of ``y_tN``, in place; returns ``scale * x @ A.T`` ``[t, R]``. The rows
    of adapter s end before ``stops_S[s]`` (int32), where those of the next begin."""
    h_tR = F.grouped_mm(x_tK, lora.A_SRK.transpose(1, 2), offs=stops_S).mul_(scale)
    column = 0
    for h_tr, B_SrN in zip(h_tR.chunk(len(lora.Bs_SrN), dim=1), lora.Bs_SrN, strict=True):
        y_tN[:, column : column + B_SrN.shape[2]] += F.grouped_mm(h_tr, B_SrN, offs=stops_S)
        column += B_SrN.shape[2]
    return h_tR


def backward_grouped(
    dy_tN: Tensor, x_tK: Tensor, dx_tK: Tensor, lora: StackedLora, stops_S: Tensor, scale: float, h_tR: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The backward of ``add_grouped``: adds to ``dx_tK`` in place; returns dA ``[S, R, K]`` and dB of each linear
    ``[S, r, N]``."""
    dys = dy_tN.split([B_SrN.shape[2] for B_SrN in lora.Bs_SrN], dim=1)
    pairs = zip(dys, lora.Bs_SrN, strict=True)
    dh_tR = torch.cat([F.grouped_mm(dy_tN, B_SrN.transpose(1, 2), offs=stops_S) for dy_tN, B_SrN in pairs], dim=1)
    dh_tR.mul_(scale)
    dx_tK += F.grouped_mm(dh_tR, lora.A_SRK, offs=stops_S)
    hs = h_tR.chunk(len(dys), dim=1)
    dBs_SrN = [F.grouped_mm(h_tr.t(), dy_tN, offs=stops_S) for h_tr, dy_tN in zip(hs, dys, strict=True)]
    return F.grouped_mm(dh_tR.t(), x_tK, offs=stops_S), dBs_SrN


class GroupedLora:
    """``segments.LoraKernels``."""

    def takes(self, segment: Segment, dtype: torch.dtype) -> bool:
        adapter = segment.adapter
        return can_be_grouped((adapter.spec.rank, *adapter.layout.widths), dtype, adapter.params_P.device)

    def products(self, segments: Sequence[Segment], dtype: torch.dtype) -> GroupedProducts:
        return GroupedProducts(segments, dtype)


@dataclass(slots=True)
class _Cluster:
    """Segments that follow each other and are alike."""

    segments: list[Segment]
    stops_S: Tensor
    params_SP: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.segments[0].start, self.segments[-1].stop)


class GroupedProducts:
    """``segments.SegmentProducts``: a call for each cluster of neighbours that are alike, so whoever orders the rows of
    a pass puts those beside each other."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        clusters: list[list[Segment]] = []
        for segment in segments:
            before = clusters[-1][-1] if clusters else None
            if before is not None and before.stop == segment.start and before.adapter.kind == segment.adapter.kind:
                clusters[-1].append(segment)
            else:
                clusters.append([segment])
        self._clusters = [_cluster(alike, dtype) for alike in clusters]

    def add(self, y_TN: Tensor, x_TK: Tensor, key: str) -> list[Tensor]:
        kept = []
        for cluster, lora in self._of_group(key):
            scale = cluster.segments[0].adapter.spec.scale
            kept.append(add_grouped(y_TN[cluster.rows], x_TK[cluster.rows], lora, cluster.stops_S, scale))
        return kept

    def backward(self, dy_TN: Tensor, x_TK: Tensor, dx_TK: Tensor, key: str, kept: list[Tensor]) -> None:
        for (cluster, lora), h_tR in zip(self._of_group(key), kept, strict=True):
            dy_tN, x_tK, dx_tK = (x[cluster.rows] for x in (dy_TN, x_TK, dx_TK))
            scale = cluster.segments[0].adapter.spec.scale
            dA_SRK, dBs_SrN = backward_grouped(dy_tN, x_tK, dx_tK, lora, cluster.stops_S, scale, h_tR)
            totals = [segment.gradients[key] for segment in cluster.segments if segment.gradients is not None]
            if totals:  # all of a pass want gradients, or none
                _add_each([total.A_RK for total in totals], dA_SRK)
                for number, dB_SrN in enumerate(dBs_SrN):
                    _add_each([total.Bs_Nr[number] for total in totals], dB_SrN.transpose(1, 2))

    def _of_group(self, key: str) -> list[tuple[_Cluster, StackedLora]]:
        of_group = []
        for cluster in self._clusters:
            lora = cluster.segments[0].adapter.layout.stacked(cluster.params_SP, key)
            if lora is not None:
                of_group.append((cluster, lora))
        return of_group


def _cluster(segments: list[Segment], dtype: torch.dtype) -> _Cluster:
    device = segments[0].adapter.params_P.device
    stops = [segment.stop - segments[0].start for segment in segments]
    params_SP = torch.stack([segment.adapter.params(dtype) for segment in segments])
    return _Cluster(segments, to_device(stops, device, torch.int32), params_SP)


def _add_each(totals: list[Tensor], shares: Tensor) -> None:
    """``totals[s] += shares[s]`` in one call for all."""
    torch._foreach_add_(totals, list(shares.to(totals[0].dtype).unbind()))
