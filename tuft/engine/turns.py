"""Which tenants take part in a sampler's next step, so that each has its share of the time.

A step costs about as much for few rows as for many, so a tenant of one sequence beside one of thirty-two would have a
thirty-second part of the engine, and wait several times as long as alone. The time of a step is charged to those who
took part, by their rows (``tuft.fairness``), and who is ahead of the others by more than ``QUANTUM_S`` stands aside
until they have caught up: n tenants have an n-th of the time each, as far as they want it, and those who want less
leave the rest to the others. With one tenant, or with equally many rows each, all take part in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from tuft.engine.requests import Continuation
from tuft.fairness import VirtualCounters

QUANTUM_S = 0.05
"""Less, and the rows that decode together would change at every step, which takes time itself."""

_STEPS = "steps"


class Turns:
    """The time that each tenant had of one sampler: seconds over its weight."""

    def __init__(self) -> None:
        self._counters = VirtualCounters(credit=QUANTUM_S)

    @property
    def has_several(self) -> bool:
        """True once more than one tenant has come, until the others have been forgotten."""
        return self._counters.num_accounts > 1

    def order(self, tenant_id: str) -> tuple[float, int]:
        """Who was served least has the lowest."""
        return self._counters.order(tenant_id)

    def next(self, weights: Mapping[str, float]) -> list[str]:
        """Of these tenants, who want something, those who take part, served least first."""
        for tenant_id, weight in weights.items():
            self._counters.set_weight(tenant_id, weight)
        self._counters.now_want(_STEPS, weights)
        self._counters.forget_idle()
        present = sorted(weights, key=self._counters.order)
        limit = min((self._counters.level(tenant_id) for tenant_id in present), default=0.0) + QUANTUM_S
        return [tenant_id for tenant_id in present if self._counters.level(tenant_id) <= limit]

    def end(self, costs: Iterable[tuple[str, float]], seconds: float) -> None:
        """A step is over that took so long; ``costs`` tell whose rows it was for."""
        of_tenant: dict[str, float] = {}
        for tenant_id, cost in costs:
            of_tenant[tenant_id] = of_tenant.get(tenant_id, 0.0) + cost
        total = sum(of_tenant.values())
        for tenant_id, cost in of_tenant.items():
            self._counters.charge(tenant_id, seconds * cost / total)


def rows_of(tenants: Sequence[str], running: Sequence[Continuation], max_rows: int) -> list[Continuation]:
    """Those of the tenants, the first tenants' first, as many as a step may have; in the order in which they run."""
    of_tenant: dict[str, list[Continuation]] = {tenant_id: [] for tenant_id in tenants}
    for one in running:
        if one.request.tenant_id in of_tenant:
            of_tenant[one.request.tenant_id].append(one)
    chosen = set(list(chain.from_iterable(of_tenant.values()))[:max_rows])
    return [one for one in running if one in chosen]
