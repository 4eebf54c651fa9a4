"""AdamW over adapters' flat buffers: one call for all runs that share its parameters, whatever their matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuft.models.lora import Adapter
from tuft.types import AdamParams


def update(params: AdamParams, due: Sequence[tuple[Adapter, Tensor]]) -> None:
    """As ``torch.optim.AdamW``, each adapter with its gradients: decoupled weight decay, bias correction, eps added
    outside the square root."""
    torch._fused_adamw_(
        [adapter.params_P for adapter, _ in due],
        [gradients_P for _, gradients_P in due],
        [adapter.moments["exp_avg"] for adapter, _ in due],
        [adapter.moments["exp_avg_sq"] for adapter, _ in due],
        [],
        [torch.tensor(float(adapter.step + 1), device=adapter.params_P.device) for adapter, _ in due],
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        weight_decay=params.weight_decay,
        eps=params.eps,
        amsgrad=False,
        maximize=False,
    )
