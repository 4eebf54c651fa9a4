"""What is counted, what it costs, and what there may be no more of: the words of the ledger and of quotas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, get_args


class UsageKey(NamedTuple):
    """What usage is counted by. ``session_id`` is empty and ``key_number`` 0 where there is none. ``rate``: its price
    when it was used (``rate_of``)."""

    tenant_id: str
    hour: datetime
    session_id: str
    base_model: str
    kind: str
    key_number: int = 0
    rate: int = 0


GIGABYTE = 10**9
GIGABYTE_MONTH = GIGABYTE * 720 * 3600
"""In byte seconds: a month has 720 hours, as the API defines it."""
_RATES_A_UNIT = 10**9  # rates and costs are whole numbers, so that they add up exactly
COSTS_A_UNIT = 10**15


def rate_of(price: float) -> int:
    """A price in units of the currency, for a million tokens or a gigabyte month, as a rate."""
    return round(price * _RATES_A_UNIT)


def price_of(rate: int) -> float:
    return rate / _RATES_A_UNIT


def cost_of(kind: str, quantity: int, rate: int) -> int:
    """In ``COSTS_A_UNIT`` of a unit of the currency: that of tokens, or of the byte seconds of ``storage``."""
    return quantity * rate * 10**6 // GIGABYTE_MONTH if kind == "storage" else quantity * rate


QuotaName = Literal[
    "requests_per_s",
    "concurrent_runs",
    "queued_operations",
    "resident_bytes",
    "stored_bytes",
    "tokens_per_day",
    "spend_per_day",
    "spend_per_month",
    "spend_total",
]
QUOTA_NAMES: tuple[QuotaName, ...] = get_args(QuotaName)
"""What a tenant, or one key of theirs, may have no more of. Spending is counted in units of the currency."""


class Holder(NamedTuple):
    """Whose quota it is: the tenant's or, unless it is 0, one key's alone."""

    tenant_id: str
    key_number: int = 0


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request may use at most: tokens by kind (as ``UsageKey.kind``), and bytes of checkpoints."""

    base_model: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    stored_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())


NOTHING = Charge()


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A tenant's usage of one kind in one hour, and what its session says of itself today."""

    hour: datetime
    session_id: str | None
    base_model: str
    kind: str
    quantity: int
    project_id: str | None
    user_metadata: Mapping[str, str] | None
    key_number: int = 0
    rate: int = 0

    @property
    def cost(self) -> float:
        """In units of the currency."""
        return cost_of(self.kind, self.quantity, self.rate) / COSTS_A_UNIT
