"""The one loss whose objective is ours (docs/adr/0013): its definition in float64, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tuft.engine.losses import LOSSES, LossRecord, terms_and_gradient

LOSS = LOSSES["stable_reinforce"]


def record(
    logprobs: object, recorded: object, advantages: object, is_sampled: object = 1.0, kl_coeff: float = 0.0
) -> LossRecord:
    arrays = np.broadcast_arrays(logprobs, recorded, advantages, is_sampled, kl_coeff)
    p, q, a, s, k = (torch.tensor(np.atleast_1d(array), dtype=torch.float32) for array in arrays)
    return LossRecord(p, {"logprobs": q, "advantages": a, "is_sampled": s, "kl_coeff": k})


def gradient_of(given: LossRecord) -> np.ndarray:
    return terms_and_gradient(LOSS, given)[1].numpy()


def test_losses_and_gradients_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    p, q = (np.float32(-rng.exponential(2.0, 400)) for _ in range(2))
    a, s = np.float32(rng.normal(size=400)), np.float32(rng.random(400) < 0.8)
    terms, gradient = terms_and_gradient(LOSS, record(p, q, a, s, 0.1))
    x, change = p.astype(float) - q, np.exp(p.astype(float)) - np.exp(q.astype(float))
    stopped = ((a > 0) & (change > 0.2)) | ((a < 0) & (change < -0.2))
    w = np.where(stopped, 0.0, np.minimum(np.exp(x), 2.0))
    huber = np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)
    np.testing.assert_allclose(terms.loss_M.detach().numpy(), s * (-w * a * p + 0.1 * huber), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.numpy(), s * (-w * a + 0.1 * np.clip(x, -1, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_coeff", [0.0, 0.5])
def test_on_policy_it_is_reinforce(kl_coeff: float) -> None:
    advantages = np.array([1.0, -2.0, 0.0, 0.5])
    np.testing.assert_array_equal(gradient_of(record(-1.5, -1.5, advantages, kl_coeff=kl_coeff)), -advantages)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_no_gradient_exceeds_its_bound_however_far_off_policy(advantage: float) -> None:
    for p, q in [(-0.001, -80.0), (-80.0, -0.001), (-1e4, -1e-4), (-3.0, -2.9)]:
        assert abs(gradient_of(record(p, q, advantage, kl_coeff=0.1))[0]) <= 2.0 + 0.1


def test_a_token_stops_once_it_has_moved_far_and_may_always_move_back() -> None:
    assert gradient_of(record(np.log(0.5), np.log(0.2), 1.0)) == 0  # has risen by 0.3
    assert gradient_of(record(np.log(0.2), np.log(0.5), -1.0)) == 0  # has fallen by 0.3
    assert gradient_of(record(np.log(0.2), np.log(0.5), 1.0)) == pytest.approx(-0.4, rel=1e-5)
    assert gradient_of(record(np.log(0.5), np.log(0.2), -1.0)) == 2.0


def test_targets_that_were_not_sampled_have_no_loss_and_no_gradient() -> None:
    given = record(-3.0, 0.0, [1.0, 1.0], [0.0, 1.0], kl_coeff=1.0)
    terms, gradient = terms_and_gradient(LOSS, given)
    assert terms.loss_M[0] == gradient[0] == 0
    assert gradient[1] != 0


def test_metrics_count_sampled_targets_alone() -> None:
    terms, _ = terms_and_gradient(LOSS, record([-1.0, -2.0, -1.0], [0.0, -1.5, -3.0], 1.0, [0.0, 1.0, 1.0]))
    metrics = {name: values.tolist() for name, values in terms.metrics().items()}
    assert metrics["logprob_diff:max"] == [0.5, 2.0]
    assert metrics["kl_v1:mean"] == [0.5, -2.0]
    assert metrics["clip_fraction:mean"] == [0.0, 1.0]
    assert metrics["stopped_fraction:mean"] == [0.0, 1.0]
