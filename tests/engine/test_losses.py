"""The losses' formulas, and that the registry is what the service announces."""

from __future__ import annotations

import torch

from tuft.engine.base import LOSS_SIGNATURES
from tuft.engine.losses import LOSSES, LossRecord, terms_and_gradient


def test_cross_entropy_is_minus_the_weighted_sum_of_logprobs() -> None:
    logprobs_M, weights_M = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 0.0, -2.0])
    terms, gradient_M = terms_and_gradient(LOSSES["cross_entropy"], LossRecord(logprobs_M, {"weights": weights_M}))
    assert terms.loss_M.tolist() == [0.5, 0.0, -6.0]
    assert gradient_M.tolist() == [-0.5, 0.0, 2.0]
    assert not logprobs_M.requires_grad


def test_every_announced_loss_is_computed_from_the_inputs_it_announces() -> None:
    assert LOSSES.keys() == LOSS_SIGNATURES.keys()
    for name, signature in LOSS_SIGNATURES.items():
        assert {"target_tokens", *LOSSES[name].required} == signature.required
        assert signature.optional | signature.config == LOSSES[name].defaults.keys()
