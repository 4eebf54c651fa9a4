"""What is with the engine at a time, and when a future settles; the test itself answers as the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.service.parts import make_futures
from tuft.config import load_config
from tuft.engine.base import Command, OptimStep, RunLoss
from tuft.errors import EngineDied, EngineError, RunLost, SeqReused
from tuft.records import Run, Tenant, now
from tuft.service.activity import Activity
from tuft.service.audit import Audit
from tuft.service.calls import SaveExternal
from tuft.service.errands import MAX_DEATHS, SUSPECT_DEATHS
from tuft.service.futures import Futures, Pending
from tuft.service.models import BaseModels
from tuft.service.ownership import Ownership
from tuft.service.pace import Pace
from tuft.service.prices import Prices
from tuft.service.projects import Projects
from tuft.service.queue import Operation
from tuft.service.quotas import Quotas
from tuft.service.scheduler import Scheduler
from tuft.service.signing import Signer
from tuft.service.traces import Traces
from tuft.service.usage import Usage
from tuft.store.audit import AuditLog
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.ownership import Owners
from tuft.store.paces import PaceTable
from tuft.store.quotas import QuotaTable
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import UsageTable
from tuft.types import AdamParams, BaseModelInfo, Datum, Failure, FutureResult, LoraSpec, LossResult, OptimStepResult

PASS = 100
DONE = LossResult((), {"loss:sum": 1.0})
STEPPED = OptimStepResult({})
MODEL = BaseModelInfo("model", (), "llama", 1000, 512, 1, "float32", (), "", {})


class Mailbox:
    """An ``Engine`` whose replies are given by hand."""

    base_models: Sequence[BaseModelInfo] = (MODEL,)
    pass_tokens = PASS

    def __init__(self) -> None:
        self.generation = 1
        self.batches: list[list[Command]] = []
        self._replies: list[Future[Any]] = []

    def submit(self, batch: Sequence[Command]) -> list[Future[Any]]:
        replies: list[Future[Any]] = [Future() for _ in batch]
        self.batches.append(list(batch))
        self._replies += replies
        return replies

    def close(self) -> None:
        raise NotImplementedError

    async def answer(self, *results: object) -> None:
        """Reply to the oldest commands that wait for it."""
        for result in results:
            reply = self._replies.pop(0)
            if isinstance(result, Exception):
                reply.set_exception(result)
            else:
                reply.set_result(result)
            for _ in range(5):  # the way over the event loop
                await asyncio.sleep(0)

    @property
    def num_unanswered(self) -> int:
        return len(self._replies)


class Everywhere:
    """A ``Residence`` that holds every run but those of ``away``; it notes which changed, and which were asked for."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.asked: list[str] = []
        self.changes: list[str] = []
        self.refusals: dict[str, str] = {}

    def is_resident(self, run_id: str) -> bool:
        return run_id not in self.away

    def bring(self, run_id: str) -> None:
        self.asked.append(run_id)

    def refusal(self, run_id: str) -> str | None:
        return self.refusals.get(run_id)

    def changed(self, run_id: str) -> None:
        self.changes.append(run_id)


class Rig:
    """A scheduler before a mailbox, and tenants with one run each."""

    def __init__(self, database: Database, home: Path, held_bytes: int = 2**20) -> None:
        self._tenants = TenantCatalog(database)
        self.mailbox = Mailbox()
        self.futures: Futures = make_futures(database, home)
        self.residence = Everywhere()
        self.scheduler = Scheduler(
            self.mailbox, self.futures, _activity(database, home, self.mailbox), seq_gap_timeout_s=60,
            held_bytes=held_bytes,
        )  # fmt: skip
        self.scheduler.residence = self.residence
        self._seqs: dict[str, int] = {}

    def run(self, name: str) -> Run:
        moment = now()
        run = Run(name, name, "session", 0, "model", LoraSpec(), "live", moment, moment, {})
        if name not in self._seqs:
            self._seqs[name] = 0
            self._tenants.ensure_tenant(Tenant(name, name))
            self.scheduler.open(run, 1)
        return run

    async def submit(self, name: str, work: Any, seq: int | None = None) -> str:
        run = self.run(name)
        if seq is None:
            seq = self._seqs[name] = self._seqs[name] + 1
        return await self.scheduler.submit(Tenant(name, name), run, seq, "work", work)

    async def loss(self, name: str, *lengths: int) -> str:
        data = tuple(Datum(np.full(length, index), {}) for index, length in enumerate(lengths))
        return await self.submit(name, RunLoss(name, data, "cross_entropy"))

    async def step(self, name: str) -> str:
        return await self.submit(name, OptimStep(name, AdamParams()))

    async def result(self, name: str, future_id: str) -> FutureResult | Failure | Pending:
        return await self.futures.wait(Tenant(name, name), future_id, hold_s=0.0)

    def sent(self) -> list[str]:
        """The adapters of every batch that the engine has got."""
        return [" ".join(str(command.adapter_id) for command in batch) for batch in self.mailbox.batches]  # type: ignore[union-attr]


def _activity(database: Database, home: Path, mailbox: Mailbox) -> Activity:
    config = load_config(home=home)
    prices, pace, ledger = Prices(config.prices), Pace(PaceTable(database)), UsageTable(database)
    quotas = Quotas(QuotaTable(database), ledger, prices, config)
    usage = Usage(ledger, Projects(()), prices, quotas, pace, retention_days=400)
    ownership = Ownership(Owners(database), Audit(AuditLog(database), 90))
    return Activity(Traces(Signer(b"secret")), usage, pace, BaseModels(mailbox), ownership)


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[Callable[..., Rig]]:
    database = open_database(sqlite_url(tmp_path))
    rigs: list[Rig] = []

    def make(**options: int) -> Rig:
        rigs.append(Rig(database, tmp_path, **options))
        return rigs[-1]

    yield make
    for made in rigs:
        made.futures.writing.close()
    database.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


async def test_two_passes_are_with_the_engine_and_the_rest_is_decided_later(rig: Rig) -> None:
    large = await rig.loss("a", *[100] * 5)
    assert rig.sent() == ["a", "a"]
    await rig.mailbox.answer(None)
    assert rig.sent() == ["a", "a", "a"]
    await rig.mailbox.answer(None, None, None, DONE)
    assert await rig.result("a", large) == DONE


async def test_the_pass_that_waits_is_topped_up(rig: Rig) -> None:
    for name in "abcd":
        await rig.loss(name, 40)
    assert "".join(rig.sent()).replace(" ", "").startswith("abc")
    await rig.mailbox.answer(DONE)
    assert sorted(" ".join(rig.sent()).split()) == ["a", "b", "c", "d"]


async def test_a_step_and_the_next_losses_follow_without_waiting_for_replies(rig: Rig) -> None:
    loss, step, following = await rig.loss("a", 40), await rig.step("a"), await rig.loss("a", 40)
    assert [type(command) for batch in rig.mailbox.batches for command in batch] == [RunLoss, OptimStep, RunLoss]
    await rig.mailbox.answer(EngineError("no"), STEPPED, DONE)
    assert await rig.result("a", loss) == Failure("no", "server")
    assert await rig.result("a", step) == STEPPED
    assert await rig.result("a", following) == DONE
    assert rig.residence.changes == ["a", "a"], "what failed has changed nothing"


async def test_a_barrier_waits_for_every_reply_of_its_lane(rig: Rig) -> None:
    async def save(operation: Operation, call: SaveExternal) -> FutureResult:
        return await rig.scheduler.replies.ask(OptimStep(call.name, AdamParams()))  # type: ignore[no-any-return]

    rig.scheduler.perform(SaveExternal, save)
    await rig.loss("a", 100, 100, 100)
    await rig.submit("a", SaveExternal("saved", None, None))
    following = await rig.loss("a", 10)
    await rig.mailbox.answer(None, None)
    assert rig.sent() == ["a", "a", "a"]
    await rig.mailbox.answer(DONE)
    assert rig.sent() == ["a", "a", "a", "saved"]
    await rig.mailbox.answer(STEPPED)
    assert rig.sent()[-1] == "a"
    await rig.mailbox.answer(DONE)
    assert await rig.result("a", following) == DONE


async def test_an_operation_settles_by_its_last_part_with_the_first_error(rig: Rig) -> None:
    future_id = await rig.loss("a", 100, 100, 100)
    await rig.mailbox.answer(None, EngineError("first"))
    assert isinstance(await rig.result("a", future_id), Pending)
    await rig.mailbox.answer(EngineError("last"))
    assert await rig.result("a", future_id) == Failure("first", "server")


async def test_what_an_engine_held_when_it_died_is_done_again_with_all_its_parts(rig: Rig) -> None:
    future_id, step = await rig.loss("a", 100, 100, 100), await rig.step("a")
    await rig.mailbox.answer(None)
    rig.residence.away = {"a"}
    await rig.mailbox.answer(*[EngineDied("the engine died")] * 3)
    assert rig.mailbox.num_unanswered == 0
    assert set(rig.residence.asked) == {"a"}, "its run is brought in first"
    assert isinstance(await rig.result("a", future_id), Pending)
    num_sent = len(rig.sent())
    rig.residence.away = set()
    rig.scheduler.dispatch()
    await rig.mailbox.answer(None, None, DONE, STEPPED)
    assert " ".join(rig.sent()[num_sent:]).split() == ["a"] * 4
    assert await rig.result("a", future_id) == DONE
    assert await rig.result("a", step) == STEPPED


async def test_an_operation_that_engines_keep_dying_with_fails_and_the_run_goes_on(rig: Rig) -> None:
    deadly, following = await rig.step("a"), await rig.step("a")
    await rig.mailbox.answer(*[EngineDied("the engine died")] * MAX_DEATHS)
    assert await rig.result("a", deadly) == Failure("the engine died", "server")
    await rig.mailbox.answer(STEPPED)
    assert await rig.result("a", following) == STEPPED


async def test_an_innocent_operation_that_was_there_when_engines_died_is_tried_alone_and_lives(rig: Rig) -> None:
    deadly, innocent = await rig.step("a"), await rig.step("b")
    died = EngineDied("the engine died")
    while rig.mailbox.num_unanswered == 2 or len(rig.sent()) < 2 * SUSPECT_DEATHS:
        await rig.mailbox.answer(*[died] * rig.mailbox.num_unanswered)
    for _ in range(MAX_DEATHS):
        (one,) = rig.mailbox.batches[-1]
        assert rig.mailbox.num_unanswered == 1, "each is there alone"
        assert isinstance(one, OptimStep)
        if one.adapter_id == "b":
            break
        await rig.mailbox.answer(died)
    await rig.mailbox.answer(STEPPED)
    assert await rig.result("a", deadly) == Failure("the engine died", "server")
    assert await rig.result("b", innocent) == STEPPED


async def test_nothing_starts_while_the_engine_does(rig: Rig) -> None:
    rig.mailbox.base_models = ()
    future_id = await rig.loss("a", 40)
    assert rig.sent() == []
    rig.mailbox.base_models = (MODEL,)
    rig.scheduler.dispatch()
    await rig.mailbox.answer(DONE)
    assert await rig.result("a", future_id) == DONE


async def test_data_beyond_what_memory_may_hold_wait_on_the_disk(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(held_bytes=0)
    futures = [await rig.loss("a", 40, 30) for _ in range(3)]
    for future_id in futures:
        while not rig.mailbox.num_unanswered:
            await asyncio.sleep(0.01)
        (sent,) = rig.mailbox.batches[-1]
        assert isinstance(sent, RunLoss)
        assert [len(datum.tokens_T) for datum in sent.data] == [40, 30]
        await rig.mailbox.answer(DONE)
        assert await rig.result("a", future_id) == DONE


async def test_a_retry_gets_the_first_calls_future_and_another_request_is_refused(rig: Rig) -> None:
    first = await rig.step("a")
    assert await rig.submit("a", OptimStep("a", AdamParams()), seq=1) == first
    with pytest.raises(SeqReused):
        await rig.submit("a", OptimStep("a", AdamParams(learning_rate=1.0)), seq=1)
    assert rig.sent() == ["a"]


async def test_a_run_that_is_closed_in_the_middle_of_an_operation_fails_it_once(rig: Rig) -> None:
    future_id = await rig.loss("a", *[100] * 5)
    rig.scheduler.close("a", RunLost("closed"))
    assert await rig.result("a", future_id) == Failure("closed", "user")
    await rig.mailbox.answer(None, None)
    assert await rig.result("a", future_id) == Failure("closed", "user")
    assert rig.mailbox.num_unanswered == 0


async def test_a_closed_runs_operation_settles_though_its_engine_died(rig: Rig) -> None:
    future_id = await rig.step("a")
    rig.scheduler.close("a", RunLost("closed"))
    await rig.mailbox.answer(EngineDied("the engine died"))
    assert await rig.result("a", future_id) == Failure("the engine died", "server")


async def test_draining_waits_for_what_the_engine_has(rig: Rig) -> None:
    await rig.loss("a", 10)
    assert not await rig.scheduler.drain(0.01)
    await rig.mailbox.answer(DONE)
    assert await rig.scheduler.drain(0.01)
