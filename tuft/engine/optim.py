"""AdamW over an adapter's flat buffers: one pass, whatever the number of matrices. Shape letter: ``P`` parameters."""

from __future__ import annotations

import dataclasses
import math

import torch

from tuft.errors import InvalidInput, UserError
from tuft.models.lora import Adapter
from tuft.types import AdamParams, OptimStepResult

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def optim_step(adapter: Adapter, params: AdamParams) -> OptimStepResult:
    """One AdamW update from the accumulated gradients, which are zero afterwards.

    As ``torch.optim.AdamW``: decoupled weight decay, bias correction, eps added outside the square root; the gradients
    are clipped before as ``torch.nn.utils.clip_grad_norm_`` does. Without any gradients it is a step with zeros.
    Raises UserError if the gradients are not finite: they are discarded, weights and moments stay as they were.
    """
    for option in dataclasses.fields(params):
        value = getattr(params, option.name)
        if not math.isfinite(value) or value < 0:
            raise InvalidInput(f"adam_params.{option.name}", value, "must be finite and not negative")
    for name, beta in (("beta1", params.beta1), ("beta2", params.beta2)):
        if beta >= 1:
            raise InvalidInput(f"adam_params.{name}", beta, "must be below 1")
    # millions of squares in one float32 sum are wrong in the fourth digit
    grad_norm = float(torch.linalg.vector_norm(adapter.gradients_P, dtype=torch.float64))
    if not math.isfinite(grad_norm):
        adapter.gradients_P.zero_()  # kept, they would fail every later step too
        raise UserError(f"gradients: global norm is {grad_norm}; must be finite. They were discarded: no step")
    if params.grad_clip_norm > 0:
        adapter.gradients_P.mul_(min(1.0, params.grad_clip_norm / (grad_norm + _CLIP_EPS)))
    torch._fused_adamw_(
        [adapter.params_P],
        [adapter.gradients_P],
        [adapter.exp_avg_P],
        [adapter.exp_avg_sq_P],
        [],
        [torch.tensor(float(adapter.step + 1), device=adapter.params_P.device)],
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        weight_decay=params.weight_decay,
        eps=params.eps,
        amsgrad=False,
        maximize=False,
    )
    adapter.step += 1
    adapter.gradients_P.zero_()
    adapter.mark_updated()
    metrics = {"grad_norm:mean": grad_norm, "learning_rate:mean": params.learning_rate, "step:max": float(adapter.step)}
    return OptimStepResult(metrics)
