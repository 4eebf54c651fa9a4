"""When what waits will be done: rates learnt from what was computed, and the fair order. Pure; no clock but the one
passed in.

An operation of a tenant is done when the engine has computed what the tenant has before it and, of every other tenant,
what the fair order puts in between: as much as the tenant itself gets, for equal weights, or what the other wants if
that is less. What others want is what they have waiting, and what they go on sending at their present rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, exp2, log

_HALF_LIFE_S = 30.0
_MEMORY = 0.95
_MAX_BIAS = log(2.0)


class Rate:
    """So much a unit of something else (a second, say), lately: what was long ago, in that unit, counts less."""

    def __init__(self, half_life: float = _HALF_LIFE_S) -> None:
        self._half_life = half_life
        self._amount = 0.0
        self._of = 0.0

    def observe(self, amount: float, of: float) -> None:
        decay = exp2(-of / self._half_life)
        self._amount = self._amount * decay + amount
        self._of = self._of * decay + of

    @property
    def value(self) -> float | None:
        """None before anything was observed."""
        return self._amount / self._of if self._of > 0 else None


class Arrivals:
    """How much cost each tenant sends a second, lately."""

    def __init__(self, half_life_s: float = _HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._sent: dict[str, tuple[float, float]] = {}  # decayed cost, when
        self._since_s: float | None = None

    def note(self, tenant_id: str, cost: float, now_s: float) -> None:
        self._since_s = now_s if self._since_s is None else self._since_s
        amount, then_s = self._sent.get(tenant_id, (0.0, now_s))
        self._sent[tenant_id] = (amount * exp2(-(now_s - then_s) / self._half_life_s) + cost, now_s)

    def per_s(self, tenant_id: str, now_s: float) -> float:
        if tenant_id not in self._sent or self._since_s is None:
            return 0.0
        amount, then_s = self._sent[tenant_id]
        half_life_s, age_s = self._half_life_s, now_s - self._since_s
        window_s = (1 - exp2(-age_s / half_life_s)) * half_life_s / log(2.0)  # what a steady sender's amount is of
        return amount * exp2(-(now_s - then_s) / half_life_s) / max(window_s, 1.0)


@dataclass(frozen=True, slots=True)
class Demand:
    """A tenant, its cost that waits, and its cost that will come a second."""

    weight: float
    level: float
    waiting: float
    arriving_per_s: float = 0.0


def seconds_until(cost: float, mine: Demand, others: Sequence[Demand], rate_per_s: float, lead_cost: float) -> float:
    """When ``cost`` more of one tenant is computed, behind ``lead_cost`` that is under way. The engine does
    ``rate_per_s``; each of the others has up to as much as its weight is owed meanwhile."""

    level = mine.level + cost / mine.weight
    owed = [max(0.0, level - other.level) * other.weight for other in others]

    def computed_before(seconds: float) -> float:
        wanted = (other.waiting + other.arriving_per_s * seconds for other in others)
        return lead_cost + cost + sum(map(min, owed, wanted))

    low, high = (lead_cost + cost) / rate_per_s, (lead_cost + cost + sum(owed)) / rate_per_s
    for _ in range(40):  # what is computed grows with the time no faster than the time: one crossing
        middle = (low + high) / 2
        if computed_before(middle) > rate_per_s * middle:
            low = middle
        else:
            high = middle
    return high


@dataclass(slots=True)
class Bias:
    """By what factor waits were longer than they were said to be, lately; it mends what the rates leave out."""

    _log: float = 0.0
    _said: dict[str, tuple[float, float]] = field(default_factory=dict)

    def said(self, future_id: str, eta_s: float, now_s: float) -> float:
        """An estimate without it, of which the first of each future counts; returns the one to tell."""
        if eta_s > 0:
            self._said.setdefault(future_id, (now_s, eta_s))
        return eta_s * exp(self._log)

    def settled(self, future_id: str, now_s: float) -> None:
        then_s, eta_s = self._said.pop(future_id, (now_s, 0.0))
        if now_s > then_s and eta_s > 0:
            seen = min(max(log((now_s - then_s) / eta_s), -_MAX_BIAS), _MAX_BIAS)
            self._log = _MEMORY * self._log + (1 - _MEMORY) * seen
