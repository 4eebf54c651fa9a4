"""Linears with the adapters' low-rank products, each adapter's on its own rows of a packed batch.

The backward is written out, like those in ``functions``: LoRA gradients are added to the buffers that the segments
bring along, and autograd never sees them.

Shape letters: ``T`` packed rows, ``t`` rows of one segment, ``K`` in_features, ``N`` out_features, ``R`` LoRA rows of a
group, ``r`` those of one linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tuft.models.functions import MIN_ROWS, base_product, padded
from tuft.models.lora import Segment
from tuft.models.segments import LoraKernels, LoraRows, lora_rows


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
        y_tN.copy_(padded(y_tN).addmm_(padded(h_tr), B_Nr.t())[: y_tN.shape[0]])


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


class LoraProducts:
    """The low-rank products of one pass: by kernels for the segments that they take, one by one for the others."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, kernels: LoraKernels | None) -> None:
        self._dtype = dtype
        taken = [segment for segment in segments if kernels is not None and kernels.takes(segment, dtype)]
        self._others = [segment for segment in segments if kernels is None or not kernels.takes(segment, dtype)]
        self._by_kernels = kernels.products(taken, dtype) if kernels is not None and taken else None

    def add(self, y_TN: Tensor, x_TK: Tensor, key: str) -> list[Tensor]:
        """Add the products of the group ``key`` to ``y_TN`` in place; returns what ``backward`` needs."""
        kept = add_lora(y_TN, x_TK, lora_rows(self._others, key, self._dtype))
        return kept if self._by_kernels is None else kept + self._by_kernels.add(y_TN, x_TK, key)

    def backward(self, dy_TN: Tensor, x_TK: Tensor, dx_TK: Tensor, key: str, kept: list[Tensor]) -> None:
        """Adds to the segments' gradient buffers, and to ``dx_TK`` in place."""
        rows = lora_rows(self._others, key, self._dtype)
        if self._by_kernels is not None:
            self._by_kernels.backward(dy_TN, x_TK, dx_TK, key, kept[len(rows) :])
        lora_backward(dy_TN, x_TK, dx_TK, rows, kept[: len(rows)])


class LoraLinear(torch.autograd.Function):
    """``y = x @ W.T + bias`` for all rows, plus each segment's low-rank product at the group ``key``."""

    @staticmethod
    def forward(
        ctx: Any, lora: LoraProducts, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, key: str
    ) -> Tensor:
        y_TN = base_product(x_TK, weight_NK, bias_N)
        ctx.lora, ctx.key = lora, key
        ctx.save_for_backward(x_TK, weight_NK, *lora.add(y_TN, x_TK, key))
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK, *kept = ctx.saved_tensors
        dx_TK = base_product(dy_TN, weight_NK.t())
        ctx.lora.backward(dy_TN, x_TK, dx_TK, ctx.key, kept)
        return None, dx_TK, None, None, None
