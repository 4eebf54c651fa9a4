"""Dimuon: each LoRA matrix moves along the matrix sign of its preconditioned momentum. ADR 12 tells what of it is ours.

A matrix M and its momentum m, both with the rank first ([rank, n]; a B transposed), become in a step

    m <- beta1 m + (1 - beta1) gradient            not corrected for its beginning: nothing below sees its scale
    Q  = m / (rows * columns)^(1/4)                rows: the mean square of each over that of all m, plus damping
    D  = sqrt(rank) sign(Q) / |sign(Q)|            sign(Q) = (Q Q^T)^(-1/2) Q; the norm is Frobenius's
    M <- M - learning_rate c D                     c = (rank / 32)^rank_lr_correction_exponent

A momentum of zeros (an A's before its B has moved) moves nothing.

Shape letters: ``P`` an adapter's parameters, ``C`` matrices of a chunk, ``r`` rank, ``n`` their other side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tuft.models.lora import Adapter
from tuft.types import DimuonParams

_RANK = 32
"""The rank whose learning rate needs no correction."""
_CHUNK_NUMBERS = 2**20
"""Matrices are computed as many at a time as have this many numbers: in the caches of a CPU, and of bounded memory."""
_TINY = 1e-30

_SAFETY = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SIGN_STEPS = (
    *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
    (1.875, -1.25, 0.375),
)
"""Of x -> ax + bx^3 + cx^5, one after the other: Amsel et al., "The Polar Express" (arXiv 2505.16932), algorithm 1.
They lead every singular value from 1/1000 of the Frobenius norm up to 1, and smaller ones to less."""
_HALFWAY = 4


class DimuonUpdate(NamedTuple):
    """``norm``: of what was added to the weights, over all matrices. ``effective_rank``: |sign(Q)|^2, that is how many
    directions a momentum has, on average over the matrices that moved."""

    norm: float
    effective_rank: float


def update(adapter: Adapter, params: DimuonParams, gradients_P: Tensor) -> DimuonUpdate:
    """One step of one adapter; its bits depend on nothing but the adapter and ``gradients_P``."""
    rank = adapter.spec.rank
    step_size = params.learning_rate * (rank / _RANK) ** params.rank_lr_correction_exponent
    momentum_P = adapter.moments["exp_avg"].lerp_(gradients_P, 1 - params.beta1)
    momenta, weights = adapter.layout.by_width(momentum_P), adapter.layout.by_width(adapter.params_P)
    effective_ranks = []
    for width, matrices in momenta.items():
        for chunk in _chunks(len(matrices), rank * width):
            direction_Crn, effective_rank_C = directions(torch.stack(matrices[chunk]), params.damping)
            torch._foreach_add_(weights[width][chunk], direction_Crn.unbind(), alpha=-step_size)
            effective_ranks.append(effective_rank_C)
    effective_rank = torch.cat(effective_ranks)
    num_moved = int(effective_rank.count_nonzero())
    return DimuonUpdate(step_size * math.sqrt(rank * num_moved), float(effective_rank.sum()) / max(num_moved, 1))


def directions(momentum_Crn: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``D`` of each matrix and its ``|sign(Q)|^2``; zeros for a momentum of zeros."""
    Q_Crn = momentum_Crn / momentum_Crn.abs().amax((1, 2), keepdim=True).clamp_min(_TINY)  # whose squares are no zeros
    squares_Crn = Q_Crn.square()
    rows_Cr1, columns_C1n = squares_Crn.mean(2, keepdim=True), squares_Crn.mean(1, keepdim=True)
    square_C11 = rows_Cr1.mean(1, keepdim=True).clamp_min(_TINY)
    for squares in (rows_Cr1, columns_C1n):
        Q_Crn *= (squares / square_C11 + damping).pow(-0.25)
    Q_Crn /= (_SAFETY * _norm(Q_Crn)).clamp_min(_TINY)
    for steps in (_SIGN_STEPS[:_HALFWAY], _SIGN_STEPS[_HALFWAY:]):
        Q_Crn = _lifted(Q_Crn, steps)
    norm_C11 = _norm(Q_Crn)
    return Q_Crn * (math.sqrt(Q_Crn.shape[1]) / norm_C11.clamp_min(_TINY)), norm_C11.flatten().square()


def _lifted(Q_Crn: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """``steps`` upon the singular values of each matrix, taken on its Gram matrix, which is much smaller. That holds
    their squares, so small ones are vague in it: it is not to be used for all the steps to the sign at once."""
    gram_Crr = Q_Crn @ Q_Crn.mT
    lift_Crr = None
    for number, (a, b, c) in enumerate(steps, start=1):
        factor_Crr = torch.baddbmm(gram_Crr, gram_Crr, gram_Crr, beta=b, alpha=c)
        factor_Crr.diagonal(dim1=1, dim2=2).add_(a)
        lift_Crr = factor_Crr if lift_Crr is None else lift_Crr @ factor_Crr
        if number < len(steps):
            gram_Crr = factor_Crr @ gram_Crr @ factor_Crr
    assert lift_Crr is not None
    return lift_Crr @ Q_Crn


def _norm(Q_Crn: Tensor) -> Tensor:
    return Q_Crn.square().sum((1, 2), keepdim=True).sqrt()


def _chunks(count: int, numbers: int) -> Iterator[slice]:
    size = max(1, _CHUNK_NUMBERS // numbers)
    return (slice(start, start + size) for start in range(0, count, size))
