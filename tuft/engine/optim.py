"""AdamW over adapters' flat buffers: one call for all runs that are due, whatever the number of their matrices.

Shape letters: ``P`` an adapter's parameters, ``B`` blocks of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tuft.errors import InvalidInput, TuftError, UserError
from tuft.models.lora import Adapter
from tuft.types import AdamParams, OptimStepResult

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
_NORM_BLOCK = 1024


def optim_steps(steps: Sequence[tuple[Adapter, AdamParams]]) -> list[OptimStepResult | TuftError]:
    """One AdamW update of every adapter from its accumulated gradients, which are gone afterwards.

    As ``torch.optim.AdamW``: decoupled weight decay, bias correction, eps added outside the square root; the gradients
    are clipped before as ``torch.nn.utils.clip_grad_norm_`` does. Without any gradients it is a step with zeros.
    An adapter may be named once. A step that fails is its own result, and changes no weight or moment: InvalidInput for
    a parameter; UserError if the gradients' norm is not finite in float32, and then they are discarded.
    """
    assert len({id(adapter) for adapter, _ in steps}) == len(steps)
    results: list[OptimStepResult | TuftError] = []
    due: defaultdict[AdamParams, list[tuple[Adapter, Tensor]]] = defaultdict(list)
    for adapter, params in steps:
        try:
            _check(params)
            gradients_P, grad_norm = _clipped_gradients(adapter, params.grad_clip_norm)
        except TuftError as error:
            results.append(error)
            continue
        due[params].append((adapter, gradients_P))
        metrics = {"grad_norm:mean": grad_norm, "learning_rate:mean": params.learning_rate}
        results.append(OptimStepResult({**metrics, "step:max": float(adapter.step + 1)}))
    for params, group in due.items():
        _update(params, group)
    return results


def _update(params: AdamParams, group: Sequence[tuple[Adapter, Tensor]]) -> None:
    torch._fused_adamw_(
        [adapter.params_P for adapter, _ in group],
        [gradients_P for _, gradients_P in group],
        [adapter.exp_avg_P for adapter, _ in group],
        [adapter.exp_avg_sq_P for adapter, _ in group],
        [],
        [torch.tensor(float(adapter.step + 1), device=adapter.params_P.device) for adapter, _ in group],
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        weight_decay=params.weight_decay,
        eps=params.eps,
        amsgrad=False,
        maximize=False,
    )
    for adapter, _ in group:
        adapter.step += 1
        adapter.mark_updated()


def _check(params: AdamParams) -> None:
    for option in dataclasses.fields(params):
        value = getattr(params, option.name)
        if not math.isfinite(value) or value < 0:
            raise InvalidInput(f"adam_params.{option.name}", value, "must be finite and not negative")
    for name, beta in (("beta1", params.beta1), ("beta2", params.beta2)):
        if beta >= 1:
            raise InvalidInput(f"adam_params.{name}", beta, "must be below 1")


def _clipped_gradients(adapter: Adapter, max_norm: float) -> tuple[Tensor, float]:
    """Takes the adapter's gradients from it, and gives their global norm before clipping."""
    gradients_P, adapter.gradients_P = adapter.gradients_P, None
    if gradients_P is None:
        return torch.zeros_like(adapter.params_P), 0.0
    grad_norm = _norm(gradients_P)
    if not math.isfinite(grad_norm):  # kept, they would fail every later step too
        raise UserError(f"gradients: global norm is {grad_norm}; must be finite. They were discarded: no step")
    if 0 < max_norm < grad_norm + _CLIP_EPS:
        gradients_P.mul_(max_norm / (grad_norm + _CLIP_EPS))
    return gradients_P, grad_norm


def _norm(flat_P: Tensor) -> float:
    """Millions of squares in one float32 sum are wrong in the fourth digit: blocks in float32, their sum in float64."""
    whole = len(flat_P) - len(flat_P) % _NORM_BLOCK
    norms_B = torch.linalg.vector_norm(flat_P[:whole].view(-1, _NORM_BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat_P[whole:])
    return float(torch.linalg.vector_norm(torch.cat([norms_B, rest.view(1)]), dtype=torch.float64))
