"""Virtual token counters: which tenant is served next. A pure decision; no clock, no I/O.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Every tenant has a counter, its *level*:
the cost of what it was served, divided by its weight. The tenant of the lowest level is served next, and is charged at
once; where the cost is not known yet, an estimate is charged, and the difference once it is. Work is never held back
for the sake of fairness: whoever is the only one that wants anything gets all of it.

A tenant who comes (back) is lifted to the lowest level of those who want something, less a small *credit*; so idling
saves up no more than that. The credit is worth a pass: between two operations of a loop that waits for its results a
tenant is idle for a moment, and would lose its place at each; and who comes for a little is served before the pass
that waits.

Bound. Let ``u`` be the largest cost charged at once, ``w`` the smallest weight and ``c`` the credit, and let charges be
exact. The levels of all tenants who want something then lie within ``u / w + c`` of each other, so between any two
moments between which two tenants f and g wanted something all the time, their services S differ by

    | S_f / w_f  -  S_g / w_g |  <=  2 * (u / w + c)

however large their requests are and whatever others do: a training pass is charged part by part, so that ``u`` is a
part, not an operation. An estimate that was wrong by ``e`` widens this by ``e / w`` until it has been corrected. Proof:
a charge raises the lowest level by ``u / w`` at most, a newcomer comes in at the lowest less ``c`` at least, and a
level that nobody charges can only be overtaken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Costs:
    """What a token costs, in rows of a forward_backward; the defaults are seconds measured on a CPU, as a ratio."""

    forward_backward: float = 1.0
    forward: float = 0.4
    prefill: float = 0.6
    decode: float = 0.9


@dataclass(slots=True)
class _Account:
    """``last_served`` orders those of one level: who was served longest ago goes first."""

    weight: float
    level: float
    last_served: int = 0
    wants: set[str] = field(default_factory=set)


class VirtualCounters:
    """The counters of all tenants, of all kinds of work together. ``weights``: of those who have not 1. ``credit``:
    in levels, see above."""

    def __init__(self, weights: Mapping[str, float] | None = None, credit: float = 0.0) -> None:
        self.credit = credit
        self._weights = dict(weights or {})
        self._accounts: dict[str, _Account] = {}
        self._floor = 0.0  # the lowest level of those who wanted something, when last anybody did
        self._num_charges = 0

    def weight(self, tenant_id: str) -> float:
        return self._weights.get(tenant_id, 1.0)

    def set_weight(self, tenant_id: str, weight: float) -> None:
        """From now on."""
        self._weights[tenant_id] = self._account(tenant_id).weight = weight

    def level(self, tenant_id: str) -> float:
        """What the tenant was served for each unit of its weight; only differences of levels mean anything."""
        return self._account(tenant_id).level

    def order(self, tenant_id: str) -> tuple[float, int]:
        """The tenant of the lowest is served next."""
        account = self._account(tenant_id)
        return account.level, account.last_served

    def now_want(self, kind: str, tenant_ids: Iterable[str]) -> None:
        """These tenants, and no others, could be served something of that ``kind``. Those who wanted nothing until now
        are lifted."""
        wanting = set(tenant_ids)
        self._sink_floor()
        comers = []
        for tenant_id in wanting:
            account = self._account(tenant_id)
            if not account.wants:
                comers.append(account)
            account.wants.add(kind)
        for account in comers:
            account.level = max(account.level, self._floor - self.credit)
        for tenant_id, account in self._accounts.items():
            if tenant_id not in wanting:
                account.wants.discard(kind)

    def wanting(self, kind: str) -> list[str]:
        """Who could be served something of that kind."""
        return [tenant_id for tenant_id, account in self._accounts.items() if kind in account.wants]

    def charge(self, tenant_id: str, cost: float) -> None:
        """The tenant is served now. A negative cost takes back what an estimate was too high by."""
        account = self._account(tenant_id)
        account.level += cost / account.weight
        if cost > 0:
            self._num_charges += 1
            account.last_served = self._num_charges

    @property
    def num_accounts(self) -> int:
        return len(self._accounts)

    def forget_idle(self) -> None:
        """Drop the accounts of those who want nothing and would be lifted if they came now: nothing is lost."""
        self._sink_floor()
        for tenant_id, account in list(self._accounts.items()):
            if not account.wants and account.level <= self._floor - self.credit:
                del self._accounts[tenant_id]

    def _account(self, tenant_id: str) -> _Account:
        account = self._accounts.get(tenant_id)
        if account is None:
            account = self._accounts[tenant_id] = _Account(self.weight(tenant_id), self._floor - self.credit)
        return account

    def _sink_floor(self) -> None:
        """The floor only rises: who left last left it where it was."""
        levels = [account.level for account in self._accounts.values() if account.wants]
        if levels:
            self._floor = max(self._floor, min(levels))


def jain_index(services: Iterable[float]) -> float:
    """How equal they are: 1 if all are, 1/n if one has everything; 1 of none. (Jain, Chiu and Hawe, 1984)"""
    values = list(services)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
