"""The losses, one pure function a name. ``tuft.losses`` says what each reads, and the defaults.

A function sees the log-probabilities of target tokens, p below, and its inputs, all of one shape, and gives the loss of
every target; the operation's loss is their sum. Its gradient is taken by autograd with respect to p alone, so a
formula's stop-gradient, sg, is ``.detach()``. A loss of scope ``token`` is elementwise: it is given the targets in
pieces of any size, while their softmax is at hand. One of scope ``datum`` is given all of a datum at once, and costs a
second pass of the head.

Of the others' names: q are the ``logprobs`` that the data carry, those at which their tokens were sampled; A the
``advantages``; r = exp(p - q) the ratio; lo and hi the thresholds ``clip_low_threshold`` and ``clip_high_threshold``,
which bound the ratio itself.

*Sampled* targets are those with a q or an A that is not 0: data carry zeros where the text was given (the prompt, the
turns of others). Metrics are of the sampled targets alone, lest long prompts hide what happens.

Shape letter: ``M`` targets, or any shape of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_MAX_RATIO, _MAX_CHANGE = 2.0, 0.2
"""stable_reinforce's bounds of a ratio's weight and of a probability's change (docs/adr/0013)."""

Metrics = Mapping[str, Tensor]
"""Named ``name:reduction``, by ``mean``, ``sum``, ``min`` or ``max`` over all values of the operation."""


@dataclass(frozen=True, slots=True)
class LossRecord:
    """``logprobs_M``: our log-probability of each target token. ``inputs``: float32 ``[M]`` each, as the loss's
    signature names them; a client's own loss has declared its own."""

    logprobs_M: Tensor
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """``loss_M``: each target's loss. ``metrics`` are computed when they are asked for."""

    loss_M: Tensor
    metrics: Callable[[], Metrics] = dict


@dataclass(frozen=True, slots=True)
class Loss:
    terms: Callable[[LossRecord], LossTerms]
    scope: Literal["token", "datum"] = "token"


def cross_entropy(record: LossRecord) -> LossTerms:
    """``-sum w p``, with ``weights`` w as given (they may be negative, and are never normalised). Targets ``[T, K]``
    are soft targets, summed over K too.

    Source: Tinker API, "Loss functions", ``cross_entropy``.
    """
    return LossTerms(-record.inputs["weights"] * record.logprobs_M)


def importance_sampling(record: LossRecord) -> LossTerms:
    """``-sum r A``: REINFORCE, corrected for having been sampled by another policy.

    Source: Tinker API, "Loss functions", ``importance_sampling``.
    """
    return LossTerms(-_ratio(record) * record.inputs["advantages"], lambda: _off_policy(record))


def ppo(record: LossRecord) -> LossTerms:
    """``-sum min(r A, clip(r, lo, hi) A)``, token by token.

    Sources: Tinker API, "Loss functions", ``ppo``; Schulman et al. 2017, arXiv 1707.06347.
    """
    return _clipped_surrogate(record, _ratio(record), dict)


def cispo(record: LossRecord) -> LossTerms:
    """``-sum sg[clip(r, lo, hi)] p A``: no token loses its gradient, however far off it is.

    Sources: Tinker API, "Loss functions", ``cispo``; MiniMax 2025, arXiv 2506.13585.
    """
    inputs, ratio_M = record.inputs, _ratio(record).detach()
    clipped_M = ratio_M.clamp(inputs["clip_low_threshold"], inputs["clip_high_threshold"])
    return LossTerms(
        -clipped_M * record.logprobs_M * inputs["advantages"],
        lambda: {**_off_policy(record), "clip_fraction:mean": (clipped_M != ratio_M)[_is_sampled(record)].float()},
    )


def dro(record: LossRecord) -> LossTerms:
    """``-sum (p A - beta / 2 (p - q)^2)``. The square is of all targets, also of those that were not sampled: there,
    give the logprobs that are to be kept.

    Sources: Tinker API, "Loss functions", ``dro``; Richemond et al. 2024, arXiv 2405.19107.
    """
    inputs, p_M = record.inputs, record.logprobs_M
    square_M = (p_M - inputs["logprobs"]).square()
    return LossTerms(0.5 * inputs["beta"] * square_M - p_M * inputs["advantages"], lambda: _off_policy(record))


def gspo(record: LossRecord) -> LossTerms:
    """``-sum min(s_t A_t, clip(s_t, lo, hi) A_t)`` with ``s_t = exp(log s + p_t - sg[p_t])``, where the sequence's
    ``log s`` is the mean of ``sg[p] - q`` over the targets at which ``sequence_ratio_mask`` is not 0; without a mask,
    over the sampled ones. Every token has the sequence's ratio, and the gradient of its own log-probability.

    Sources: Tinker API, "Loss functions", ``gspo``; Zheng et al. 2025, arXiv 2507.18071, GSPO-token.
    """
    inputs, p_M = record.inputs, record.logprobs_M
    mask_M = inputs.get("sequence_ratio_mask")
    difference = (p_M.detach() - inputs["logprobs"])[_is_sampled(record) if mask_M is None else mask_M != 0]
    log_ratio = difference.mean() if len(difference) else difference.sum()
    log_ratio_M = log_ratio + p_M - p_M.detach()
    ratio_M = torch.where(inputs["advantages"] == 0, torch.zeros_like(p_M), log_ratio_M).exp()
    return _clipped_surrogate(record, ratio_M, lambda: {"sequence_ratio:mean": log_ratio.exp()[None]})


def stable_reinforce(record: LossRecord) -> LossTerms:
    """``-sum (sg[w] p A - kl_coeff H(p - q))`` over the targets that ``is_sampled`` marks, with q as it was recorded.

    The weight w is r, but at most 2, and 0 where the token's probability has already changed by more than 0.2 in the
    direction in which A pulls it. H is Huber's function, ``x^2 / 2`` up to ``|x| = 1`` and linear beyond. On policy
    this is REINFORCE; off policy no gradient exceeds ``2 |A| + kl_coeff``.

    Source: Tinker's contract, our objective: docs/adr/0013.
    """
    inputs, p_M, advantages_M = record.inputs, record.logprobs_M, record.inputs["advantages"]
    is_sampled_M = inputs["is_sampled"] != 0
    log_ratio_M = torch.where(is_sampled_M, p_M - inputs["logprobs"], torch.zeros_like(p_M))
    with torch.no_grad():
        ratio_M, change_M = log_ratio_M.exp(), p_M.exp() - inputs["logprobs"].exp()
        is_done_M = ((advantages_M > 0) & (change_M > _MAX_CHANGE)) | ((advantages_M < 0) & (change_M < -_MAX_CHANGE))
        weight_M = ratio_M.clamp(max=_MAX_RATIO).masked_fill(is_done_M | ~is_sampled_M, 0.0)
    policy_M = -weight_M * p_M * advantages_M
    penalty_M = inputs["kl_coeff"] * torch.nn.functional.huber_loss(
        log_ratio_M, torch.zeros_like(log_ratio_M), reduction="none"
    )
    return LossTerms(
        policy_M + penalty_M,
        lambda: {
            **_off_policy_of(log_ratio_M[is_sampled_M]),
            "policy_loss:sum": policy_M,
            "kl_loss:sum": penalty_M,
            "clip_fraction:mean": (ratio_M > _MAX_RATIO)[is_sampled_M].float(),
            "stopped_fraction:mean": is_done_M[is_sampled_M].float(),
        },
    )


def _ratio(record: LossRecord) -> Tensor:
    """r, but 1 where the advantage is 0: nothing depends on it there, and it might overflow."""
    log_ratio_M = record.logprobs_M - record.inputs["logprobs"]
    return torch.where(record.inputs["advantages"] == 0, torch.zeros_like(log_ratio_M), log_ratio_M).exp()


def _clipped_surrogate(record: LossRecord, ratio_M: Tensor, metrics: Callable[[], Metrics]) -> LossTerms:
    """``-min(ratio A, clip(ratio, lo, hi) A)``, and how many of the sampled targets have lost their gradient by it."""
    inputs = record.inputs
    surrogate_M = ratio_M * inputs["advantages"]
    clipped_M = ratio_M.clamp(inputs["clip_low_threshold"], inputs["clip_high_threshold"]) * inputs["advantages"]
    return LossTerms(
        -torch.minimum(surrogate_M, clipped_M),
        lambda: {
            **_off_policy(record),
            "clip_fraction:mean": (clipped_M < surrogate_M)[_is_sampled(record)].float(),
            **metrics(),
        },
    )


def _is_sampled(record: LossRecord) -> Tensor:
    return (record.inputs["logprobs"] != 0) | (record.inputs["advantages"] != 0)


def _off_policy(record: LossRecord) -> Metrics:
    """How far the policy is from the one that sampled: ``kl_v1`` and ``kl_v2`` estimate KL(q, p) by q - p and by half
    its square (Schulman 2020, "Approximating KL divergence")."""
    return _off_policy_of((record.logprobs_M - record.inputs["logprobs"])[_is_sampled(record)])


def _off_policy_of(log_ratio: Tensor) -> Metrics:
    return {
        "ratio:mean": log_ratio.exp(),
        "kl_v1:mean": -log_ratio,
        "kl_v2:mean": 0.5 * log_ratio.square(),
        "logprob_diff:mean": log_ratio.abs(),
        "logprob_diff:max": log_ratio.abs(),
    }


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "importance_sampling": Loss(importance_sampling),
    "ppo": Loss(ppo),
    "cispo": Loss(cispo),
    "dro": Loss(dro),
    "gspo": Loss(gspo, scope="datum"),
    "stable_reinforce": Loss(stable_reinforce),
}


def terms_and_gradient(loss: Loss, record: LossRecord) -> tuple[LossTerms, Tensor]:
    """The loss of every target and its derivative with respect to the target's log-probability."""
    logprobs_M = record.logprobs_M.detach().requires_grad_()
    with torch.enable_grad():
        terms = loss.terms(LossRecord(logprobs_M, record.inputs))
        (gradient_M,) = torch.autograd.grad(terms.loss_M.sum(), logprobs_M)
    return terms, gradient_M
