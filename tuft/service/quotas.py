"""What tenants and keys may have: the one place where it is checked, before anything is acknowledged.

A request reserves the most that it can use, and gives back at its end what it did not. So the sum of what was used and
what is reserved never passes a cap, however many requests race for the last of it. A request over a limit is refused:
its client comes back with it later, and nothing that was acknowledged is ever taken back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

import structlog

from tuft.config import Config
from tuft.errors import CapReached, QuotaExceeded, StorageError
from tuft.footprint import resident_bytes
from tuft.metering import COSTS_A_UNIT, QUOTA_NAMES, Charge, Holder, QuotaName, UsageKey, cost_of
from tuft.records import Run, Tenant, now
from tuft.service.models import BaseModels
from tuft.service.prices import Prices
from tuft.store.quotas import QuotaTable
from tuft.store.usage import FOLDED, UsageTable

log = structlog.get_logger(__name__)

TOKEN_KINDS = ("training", "prefill", "prefill_cached", "sample")
_REFRESH_INTERVAL_S = 1.0
_SOON_S = 5.0
"""When to come back for what ends with work that is under way."""

_OPTIONS: Mapping[QuotaName, str] = {
    "concurrent_runs": "limits.max_runs_per_tenant",
    "queued_operations": "limits.max_pending_per_tenant",
}


@dataclass(slots=True)
class _Account:
    """What a holder has used, by the day (UTC) of this month and before, and what its waiting work may use."""

    tokens: Counter[date] = field(default_factory=Counter)
    costs: Counter[date] = field(default_factory=Counter)
    num_waiting: int = 0
    reserved_tokens: int = 0
    reserved_cost: int = 0
    reserved_bytes: int = 0
    bucket: float | None = None
    filled_at_s: float = 0.0

    def count(self, key: UsageKey, quantity: int) -> None:
        day = key.hour.date()
        self.costs[day] += cost_of(key.kind, quantity, key.rate)
        if key.kind in TOKEN_KINDS:
            self.tokens[day] += quantity

    def reserve(self, held: _Reservation, sign: int) -> None:
        self.num_waiting += sign
        self.reserved_tokens += sign * held.num_tokens
        self.reserved_cost += sign * held.cost
        self.reserved_bytes += sign * held.num_bytes


@dataclass(frozen=True, slots=True)
class _Reservation:
    holders: tuple[Holder, ...]
    num_tokens: int
    cost: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Need:
    """``more`` of what a quota counts, of which ``used`` and ``reserved`` are gone. ``scale``: in these units.
    ``free_at``: when what was used is free again; None if that is up to the holder or an operator."""

    name: QuotaName
    used: int
    reserved: int
    more: int
    unit: str = ""
    scale: int = 1
    is_cap: bool = False
    free_at: datetime | None = None
    remedy: str = ""


class Quotas:
    """Lives on one event loop; the accounts of a tenant are read from the ledger when it first asks for anything, and
    kept in step from then on: one server writes a ledger."""

    def __init__(self, table: QuotaTable, ledger: UsageTable, prices: Prices, config: Config) -> None:
        self._table = table
        self._ledger = ledger
        self._prices = prices
        self._options = configured_quotas(config)
        self._set: Mapping[Holder, Mapping[QuotaName, float | None]] = {}
        self._refresh_at_s = 0.0
        self._accounts: dict[Holder, _Account] = {}
        self._opened: set[str] = set()
        self._reservations: dict[str, _Reservation] = {}

    # --- limits -------------------------------------------------------------------------------------------------------

    def allowed(self, holder: Holder, name: QuotaName) -> float | None:
        """How much the holder may have; None is no limit. A key has none of its own unless one was set."""
        self._refresh()
        own = self._set.get(holder, {})
        if name in own:
            return own[name]
        return None if holder.key_number else self._options.get(name)

    def _refresh(self) -> None:
        """What was set a second ago holds now. While the database refuses, what was known holds on."""
        if time.monotonic() < self._refresh_at_s:
            return
        self._refresh_at_s = time.monotonic() + _REFRESH_INTERVAL_S
        try:
            self._set = self._table.all()
        except StorageError as error:
            log.error("quotas cannot be read", error=str(error))

    # --- checks -------------------------------------------------------------------------------------------------------

    def admit(self, tenant: Tenant) -> None:
        """One request more. Raises QuotaExceeded if there were too many within the last moments."""
        limits = [(holder, rate) for holder in _holders(tenant) if (rate := self.allowed(holder, "requests_per_s"))]
        moment_s = time.monotonic()
        for holder, rate in limits:
            account = self._accounts.setdefault(holder, _Account())
            burst = max(rate, 1.0)
            filled = burst if account.bucket is None else account.bucket + rate * (moment_s - account.filled_at_s)
            account.bucket, account.filled_at_s = min(filled, burst), moment_s
            if account.bucket < 1.0:
                wait_s = (1.0 - account.bucket) / rate
                where = self._where(holder, "requests_per_s")
                raise QuotaExceeded(
                    f"requests_per_s: {_whose(tenant, holder)} sent more than {where} allows, {rate:g} a second; "
                    f"free again in {wait_s:.2g} s",
                    wait_s,
                )
        for holder, _ in limits:
            account = self._accounts[holder]
            assert account.bucket is not None
            account.bucket -= 1.0

    def require_run(
        self, tenant: Tenant, run: Run, loaded: Iterable[Run], models: BaseModels, is_here: Callable[[str], bool]
    ) -> None:
        """Room for ``run`` beside those that are loaded, of all tenants. Only those that begin, or that memory holds
        (``is_here``), take of its bytes. Raises QuotaExceeded."""

        def size(run: Run) -> int:
            return resident_bytes(models.require(run.base_model).linear_shapes, run.spec, run.optimizer)

        remedy = "unload a run, or finish a session, first"
        own = [other for other in loaded if other.tenant_id == tenant.tenant_id]
        for holder in _holders(tenant):
            counted = [other for other in own if holder.key_number in (0, other.key_number)]
            self._require(tenant, holder, _Need("concurrent_runs", len(counted), 0, 1, remedy=remedy))
            if self.allowed(holder, "resident_bytes") is not None:
                here = [other for other in counted if other.status == "creating" or is_here(other.run_id)]
                used = sum(map(size, here))
                self._require(tenant, holder, _Need("resident_bytes", used, 0, size(run), "bytes", remedy=remedy))

    def reserve(self, future_id: str, tenant: Tenant, charge: Charge) -> None:
        """Take what the request may use at most. Raises QuotaExceeded, or CapReached where only time or an operator
        helps; then nothing is taken."""
        self._open(tenant.tenant_id)
        cost = self._prices.most(charge)
        for need in self._needs(tenant, charge, cost):
            self._require(tenant, *need)
        self._take(future_id, _Reservation(tuple(_holders(tenant)), charge.num_tokens, cost, charge.stored_bytes))

    def take_up(self, future_id: str, tenant_id: str, key_number: int, charge: Charge) -> None:
        """The same for what an earlier server acknowledged: it is not checked again."""
        self._open(tenant_id)
        holders = tuple(_holders(Tenant(tenant_id, "", key_number)))
        reservation = _Reservation(holders, charge.num_tokens, self._prices.most(charge), charge.stored_bytes)
        self._take(future_id, reservation)

    def release(self, future_id: str) -> None:
        """The request has ended, or was not acknowledged: what it did not use is free again."""
        held = self._reservations.pop(future_id, None)
        if held is not None:
            for holder in held.holders:
                self._accounts[holder].reserve(held, -1)

    def settle(self, future_id: str, usage: Mapping[UsageKey, int]) -> None:
        """The request has ended and used that, which the ledger gets too."""
        self.count(usage)
        self.release(future_id)

    def count(self, usage: Mapping[UsageKey, int]) -> None:
        for key, quantity in usage.items():
            self._open(key.tenant_id)
            for holder in {Holder(key.tenant_id), Holder(key.tenant_id, key.key_number)}:
                self._accounts.setdefault(holder, _Account()).count(key, quantity)

    def num_waiting(self, tenant_id: str) -> int:
        account = self._accounts.get(Holder(tenant_id))
        return 0 if account is None else account.num_waiting

    # --- inner --------------------------------------------------------------------------------------------------------

    def _take(self, future_id: str, reservation: _Reservation) -> None:
        self._reservations[future_id] = reservation
        for holder in reservation.holders:
            self._accounts.setdefault(holder, _Account()).reserve(reservation, +1)

    def _open(self, tenant_id: str) -> None:
        """Read the tenant's accounts, once."""
        if tenant_id in self._opened:
            return
        month = now().replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        earlier = self._ledger.sums(FOLDED, tenant_id, until=month)
        daily = self._ledger.daily_sums(month, tenant_id)
        self._opened.add(tenant_id)
        for one in (*earlier, *daily):
            hour = FOLDED if one.day is None else datetime.combine(one.day, FOLDED.timetz())
            self.count(
                {UsageKey(tenant_id, hour, "", one.base_model, one.kind, one.key_number, one.rate): one.quantity}
            )

    def _needs(self, tenant: Tenant, charge: Charge, cost: int) -> Iterator[tuple[Holder, _Need]]:
        moment = now()
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1) if midnight.day != 1 else midnight
        today = moment.date()
        currency = self._prices.currency
        stored = self._stored(tenant) if charge.stored_bytes else {}
        for holder in _holders(tenant):
            account = self._accounts.setdefault(holder, _Account())
            yield holder, _Need("queued_operations", account.num_waiting, 0, 1, remedy="read some results first")
            if charge.num_tokens:
                used = account.tokens[today]
                tokens = (used, account.reserved_tokens, charge.num_tokens, "tokens", 1, True, midnight)
                yield holder, _Need("tokens_per_day", *tokens)
            if charge.stored_bytes:
                remedy = "deleting checkpoints makes room"
                sizes = (stored[holder], account.reserved_bytes, charge.stored_bytes, "bytes", 1, True, None)
                yield holder, _Need("stored_bytes", *sizes, remedy)
            if cost:
                rest = (account.reserved_cost, cost, currency, COSTS_A_UNIT, True)
                this_month = sum(costs for day, costs in account.costs.items() if _month(day) == _month(today))
                yield holder, _Need("spend_per_day", account.costs[today], *rest, midnight)
                yield holder, _Need("spend_per_month", this_month, *rest, next_month)
                yield holder, _Need("spend_total", account.costs.total(), *rest)

    def _stored(self, tenant: Tenant) -> Mapping[Holder, int]:
        holders = _holders(tenant)
        if all(self.allowed(holder, "stored_bytes") is None for holder in holders):
            return dict.fromkeys(holders, 0)
        of_tenant, of_key = self._ledger.stored_bytes_of(tenant)
        return dict(zip(holders, (of_tenant, of_key), strict=False))

    def _require(self, tenant: Tenant, holder: Holder, need: _Need) -> None:
        allowed = self.allowed(holder, need.name)
        if allowed is None or need.used + need.reserved + need.more <= allowed * need.scale:
            return
        used, reserved, more = (_shown(number, need) for number in (need.used, need.reserved, need.more))
        waiting = f", {reserved} are reserved by work of theirs that waits" if need.reserved else ""
        when, retry_after_s = self._when_free(need, allowed)
        raise (CapReached if need.is_cap else QuotaExceeded)(
            f"{need.name}: {_whose(tenant, holder)} has used {used}{waiting}, and this asks for {more}; "
            f"{self._where(holder, need.name)} is {_shown(round(allowed * need.scale), need)}; {when}",
            retry_after_s,
        )

    def _when_free(self, need: _Need, allowed: float) -> tuple[str, float]:
        """In words, and in seconds."""
        if need.more > allowed * need.scale:
            return "that is more than this may ever be: ask for less, or have it raised", _SOON_S
        if need.used + need.more <= allowed * need.scale:
            return need.remedy or "free again when that work ends", _SOON_S
        if need.free_at is not None:
            wait_s = max((need.free_at - now()).total_seconds(), 1.0)
            return f"free again at {need.free_at:%Y-%m-%d %H:%M} UTC, or when it is raised", wait_s
        return need.remedy or "free again when it is raised", _SOON_S

    def _where(self, holder: Holder, name: QuotaName) -> str:
        """Which setting says how much is allowed."""
        if name in self._set.get(holder, {}):
            return "the key's quota" if holder.key_number else "the tenant's quota"
        return _OPTIONS.get(name, f"quotas.{name}")


def configured_quotas(config: Config) -> dict[QuotaName, float | None]:
    """What every tenant may have for whom nothing else was set. None is no limit."""
    values = {
        **config.quotas.model_dump(exclude={"pause_s"}),
        "concurrent_runs": config.limits.max_runs_per_tenant,
        "queued_operations": config.limits.max_pending_per_tenant,
    }
    return {name: values[name] for name in QUOTA_NAMES}


def _holders(tenant: Tenant) -> list[Holder]:
    tenant_id = tenant.tenant_id
    return [Holder(tenant_id), *([Holder(tenant_id, tenant.key_number)] if tenant.key_number else [])]


def _whose(tenant: Tenant, holder: Holder) -> str:
    return f"API key {holder.key_number}" if holder.key_number else f"tenant {tenant.name}"


def _month(day: date) -> tuple[int, int]:
    return day.year, day.month


def _shown(number: int, need: _Need) -> str:
    if need.scale != 1:
        return f"{number / need.scale:,.6f}".rstrip("0").rstrip(".") + f" {need.unit}"
    return f"{number:,}" + (f" {need.unit}" if need.unit else "")
