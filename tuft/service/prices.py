"""What things cost, by kind and base model: the price table of the configuration as rates of the ledger."""

from __future__ import annotations

from collections.abc import Mapping

from tuft.metering import COSTS_A_UNIT, Charge, cost_of, rate_of
from tuft.sections import PricesSection

_OPTIONS: Mapping[str, str] = {
    "training": "train",
    "prefill": "prefill",
    "prefill_cached": "cached_prefill",
    "sample": "sample",
    "storage": "storage",
}
"""Kind of usage to the option that prices it; the others are free."""


class Prices:
    """Rates as in ``records.rate_of``, costs in ``COSTS_A_UNIT``."""

    def __init__(self, section: PricesSection) -> None:
        self._section = section
        self.currency = section.currency

    def rate(self, kind: str, base_model: str) -> int:
        option = _OPTIONS.get(kind)
        if option is None:
            return 0
        own = self._section.models.get(base_model)
        price = None if own is None else getattr(own, option)
        return rate_of(getattr(self._section, option) if price is None else price)

    def most(self, charge: Charge) -> int:
        """What the request may cost at most: a prompt may be found in the cache or not."""
        return sum(
            quantity * max(self.rate(each, charge.base_model) for each in _also(kind))
            for kind, quantity in charge.tokens.items()
        )

    def cost(self, kind: str, base_model: str, quantity: int) -> float:
        """In units of the currency, at today's price."""
        return cost_of(kind, quantity, self.rate(kind, base_model)) / COSTS_A_UNIT


def _also(kind: str) -> tuple[str, ...]:
    return ("prefill", "prefill_cached") if kind == "prefill" else (kind,)
