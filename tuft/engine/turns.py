"""Which tenants take part in a sampler's next step, so that each has its share of the time.

A step costs about as much for few rows as for many, so a tenant of one sequence beside one of thirty-two would have a
thirty-second part of the engine, and wait several times as long as alone. The time of a step is charged to those who
took part, by their rows (``tuft.fairness``), and who is ahead of the others by more than ``QUANTUM_S`` stands aside until
they have caught up: n tenants have an n-th of the time each, as far as they want it, and those who want less leave the
rest to the others. With one tenant, or with equally many rows each, all take part in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tuft.fairness import VirtualCounters

QUANTUM_S = 0.05
"""Seconds. Less, and the rows that decode together would change at every step, which takes time itself."""

_KIND = "steps"


@dataclass(frozen=True, slots=True)
class Turn:
    """``tenants``: who takes part, those served least first; ``weights`` of rows are what ``Turns.end`` wants."""

    tenants: tuple[str, ...]

    def place(self, tenant_id: str) -> int:
        return self.tenants.index(tenant_id)


class Turns:
    """The time that each tenant had of one sampler, in seconds over its weight."""

    def __init__(self) -> None:
        self._counters = VirtualCounters(credit=QUANTUM_S)

    @property
    def has_several(self) -> bool:
        """True once more than one tenant has come."""
        return self._counters.num_accounts > 1

    def weigh(self, tenant_id: str, weight: float) -> None:
        self._counters.set_weight(tenant_id, weight)

    def order(self, tenant_id: str) -> tuple[float, int]:
        """Who was served least has the lowest."""
        return self._counters.order(tenant_id)

    def next(self, tenant_ids: Iterable[str]) -> Turn:
        """Of these, who want something, those who take part."""
        present = sorted(set(tenant_ids), key=self._counters.order)
        if len(present) > 1 or self._counters.num_accounts > 1:
            self._counters.now_want(_KIND, present)
        if len(present) < 2:
            return Turn(tuple(present))
        limit = self._counters.level(present[0]) + QUANTUM_S
        return Turn(tuple(tenant for tenant in present if self._counters.level(tenant) <= limit))

    def end(self, costs: Mapping[str, float], seconds: float) -> None:
        """A step is over that took so long; ``costs`` tell whose rows it was for."""
        total = sum(costs.values())
        for tenant_id, cost in costs.items():
            self._counters.charge(tenant_id, seconds * cost / total)
