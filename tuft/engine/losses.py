"""The losses, one pure function a name.

A function sees the log-probabilities of target tokens and its inputs, all of one shape, and returns the loss of every
target; the operation's loss is their sum. Its gradient is taken by autograd with respect to ``logprobs_M`` alone, so a
formula's stop-gradient is ``.detach()``. A loss of scope ``token`` must be elementwise: it is given the targets in
pieces, while their softmax is at hand. One of scope ``sequence`` would be given whole data, and costs a second pass.

Every input that is not ``target_tokens`` arrives as a float32 tensor ``[M]``: from the datum, else from the operation's
``loss_fn_config``, else the default given here. Shape letter: ``M`` target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossRecord:
    """``logprobs_M``: our log-probability of each target token. ``inputs``: name to ``[M]``, as the loss declares."""

    logprobs_M: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """``loss_M``: each target's loss. ``metrics``: further values a target, keyed ``name:sum`` or ``name:mean`` as they
    are to be reduced over the operation."""

    loss_M: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loss:
    """``required`` and ``defaults`` together name the inputs that ``terms`` reads."""

    terms: Callable[[LossRecord], LossTerms]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    scope: Literal["token"] = "token"


def cross_entropy(record: LossRecord) -> LossTerms:
    """``-sum w p``, with ``weights`` w as given (they may be negative, and are never normalised) and p the targets'
    log-probabilities; targets ``[T, K]`` are soft targets, summed over K too.

    Source: Tinker API, "Loss functions", ``cross_entropy``.
    """
    return LossTerms(-record.inputs["weights"] * record.logprobs_M)


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, defaults={"weights": 1.0}),
}


def terms_and_gradient(loss: Loss, record: LossRecord) -> tuple[LossTerms, Tensor]:
    """The loss of every target and its derivative with respect to the target's log-probability."""
    logprobs_M = record.logprobs_M.detach().requires_grad_()
    with torch.enable_grad():
        terms = loss.terms(LossRecord(logprobs_M, record.inputs))
        (gradient_M,) = torch.autograd.grad(terms.loss_M.sum(), logprobs_M)
    metrics = {name: values_M.detach() for name, values_M in terms.metrics.items()}
    return LossTerms(terms.loss_M.detach(), metrics), gradient_M
