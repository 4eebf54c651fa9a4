"""Optimizer steps of all runs that are due, each of its own family.

Shape letters: ``P`` an adapter's parameters, ``B`` blocks of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tuft.engine import adamw, dimuon
from tuft.errors import TuftError, UserError
from tuft.models.lora import Adapter
from tuft.optimizers import check_step
from tuft.types import AdamParams, OptimizerParams, OptimStepResult

_CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
_NORM_BLOCK = 1024


def optim_steps(steps: Sequence[tuple[Adapter, OptimizerParams]]) -> list[OptimStepResult | TuftError]:
    """One update of every adapter from its accumulated gradients, which are gone afterwards.

    The gradients are clipped before as ``torch.nn.utils.clip_grad_norm_`` does. Without any gradients it is a step with
    zeros. An adapter may be named once. A step that fails is its own result, and changes no weight or moment:
    InvalidInput for a parameter, or params of another family than the adapter's; UserError if the gradients' norm is
    not finite in float32, and then they are discarded.
    """
    assert len({id(adapter) for adapter, _ in steps}) == len(steps)
    results: list[OptimStepResult | TuftError] = []
    due: defaultdict[AdamParams, list[tuple[Adapter, Tensor]]] = defaultdict(list)
    for adapter, params in steps:
        try:
            check_step(params, adapter.optimizer)
            gradients_P, grad_norm = _clipped_gradients(adapter, params.grad_clip_norm)
        except TuftError as error:
            results.append(error)
            continue
        metrics = {"grad_norm:mean": grad_norm, "learning_rate:mean": params.learning_rate}
        metrics["step:max"] = float(adapter.step + 1)
        if isinstance(params, AdamParams):
            due[params].append((adapter, gradients_P))
        else:
            done = dimuon.update(adapter, params, gradients_P)
            _count(adapter)
            metrics |= {"update_norm:mean": done.norm, "effective_rank:mean": done.effective_rank}
        results.append(OptimStepResult(metrics))
    for shared, group in due.items():
        adamw.update(shared, group)
        for adapter, _ in group:
            _count(adapter)
    return results


def _count(adapter: Adapter) -> None:
    adapter.step += 1
    adapter.mark_updated()


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
