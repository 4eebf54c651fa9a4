"""Data of policy gradients, and every loss once more: in float64, token by token, with derivatives made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tests.engine.reference import random_data
from tuft.types import Datum

CONFIGS: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05},
}
"""So narrow that a good part of random ratios is clipped."""


def policy_data(
    vocab_size: int, lengths: Sequence[int], logprobs: Sequence[np.ndarray] | None = None, seed: int = 0
) -> tuple[Datum, ...]:
    """Of each datum the first third is a prompt: zeros. The others' q lie around ``logprobs``, some 0.4 off."""
    rng = np.random.default_rng(seed)
    data = []
    for index, datum in enumerate(random_data(vocab_size, lengths, seed)):
        num_tokens = datum.num_tokens
        is_sampled_T = np.arange(num_tokens) >= num_tokens // 3
        p_T = np.full(num_tokens, -6.0) if logprobs is None else logprobs[index]
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": (np.minimum(p_T + rng.normal(0, 0.4, num_tokens), -1e-3) * is_sampled_T).astype(np.float32),
            "advantages": (rng.normal(0, 1, num_tokens) * is_sampled_T).astype(np.float32),
        }
        data.append(replace(datum, loss_fn_inputs=inputs))
    return tuple(data)


@dataclass
class Expected:
    """Of one datum: its loss, dloss/dp of each target, and every value of each metric."""

    loss: float = 0.0
    gradient: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(self, loss: float, derivative: float) -> None:
        self.loss += loss
        self.gradient.append(derivative)

    def note(self, **values: float) -> None:
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value)


def expected(loss_fn: str, logprobs: np.ndarray, datum: Datum, config: Mapping[str, float]) -> Expected:
    given = {name: array.astype(np.float64).ravel().tolist() for name, array in datum.loss_fn_inputs.items()}
    p = logprobs.astype(np.float64).ravel().tolist()
    if loss_fn == "cross_entropy":
        found = Expected()
        for p_t, w_t in zip(p, given.get("weights", [1.0] * len(p)), strict=True):
            found.add(-w_t * p_t, -w_t)
        return found
    return _off_policy(loss_fn, p, given, config)


def _off_policy(
    loss_fn: str, p: list[float], given: Mapping[str, list[float]], config: Mapping[str, float]
) -> Expected:
    q, advantages, found = given["logprobs"], given["advantages"], Expected()
    is_sampled = [q_t != 0 or a_t != 0 for q_t, a_t in zip(q, advantages, strict=True)]
    marked = [i for i, mark in enumerate(given.get("sequence_ratio_mask", is_sampled)) if mark]
    sequence_ratio = math.exp(sum(p[i] - q[i] for i in marked) / len(marked)) if marked else 1.0
    if loss_fn == "gspo":
        found.note(**{"sequence_ratio:mean": sequence_ratio})
    for i, (p_t, q_t, a_t) in enumerate(zip(p, q, advantages, strict=True)):
        ratio = math.exp(p_t - q_t)
        of_loss = sequence_ratio if loss_fn == "gspo" else ratio
        low = given.get("clip_low_threshold", [config.get("clip_low_threshold", 0.0)] * len(p))[i]
        high = given.get("clip_high_threshold", [config.get("clip_high_threshold", 0.0)] * len(p))[i]
        is_clipped = (a_t > 0 and of_loss > high) or (a_t < 0 and of_loss < low)
        clipped = max(low, min(of_loss, high))
        if loss_fn == "importance_sampling":
            found.add(-ratio * a_t, -ratio * a_t)
        elif loss_fn in ("ppo", "gspo"):
            found.add(-(clipped if is_clipped else of_loss) * a_t, 0.0 if is_clipped else -of_loss * a_t)
        elif loss_fn == "cispo":
            is_clipped = clipped != ratio
            found.add(-clipped * p_t * a_t, -clipped * a_t)
        elif loss_fn == "dro":
            beta = config["beta"]
            found.add(-(p_t * a_t - beta / 2 * (p_t - q_t) ** 2), -(a_t - beta * (p_t - q_t)))
        if is_sampled[i]:
            difference = abs(p_t - q_t)
            found.note(**{"ratio:mean": ratio, "kl_v1:mean": q_t - p_t, "kl_v2:mean": difference**2 / 2})
            found.note(**{"logprob_diff:mean": difference, "logprob_diff:max": difference})
            if loss_fn in ("ppo", "gspo", "cispo"):
                found.note(**{"clip_fraction:mean": float(is_clipped)})
    return found


def reduced(all_expected: Sequence[Expected]) -> dict[str, float]:
    """What the operation reports."""
    metrics = {"loss:sum": sum(found.loss for found in all_expected)}
    for name in all_expected[0].metrics:
        values = [value for found in all_expected for value in found.metrics[name]]
        metrics[name] = max(values) if name.endswith(":max") else sum(values) / len(values)
    return metrics
