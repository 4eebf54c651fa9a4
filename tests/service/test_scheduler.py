"""What is with the engine at a time, and when a future settles; the test itself answers as the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from tuft.engine.base import Command, OptimStep, RunLoss
from tuft.errors import EngineDied, EngineError, RunLost
from tuft.records import Run, Tenant, now
from tuft.service.activity import Activity
from tuft.service.futures import Futures, Pending
from tuft.service.projects import Projects
from tuft.service.scheduler import Scheduler
from tuft.service.signing import Signer
from tuft.service.traces import Traces
from tuft.service.usage import Usage
from tuft.store.db import open_database
from tuft.store.usage import UsageTable
from tuft.types import AdamParams, BaseModelInfo, Datum, Failure, FutureResult, LoraSpec, LossResult, OptimStepResult

PASS = 100
DONE = LossResult((), {"loss:sum": 1.0})
STEPPED = OptimStepResult({})


class Mailbox:
    """An ``Engine`` whose replies are given by hand."""

    base_models: Sequence[BaseModelInfo] = ()
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


class Rig:
    """A scheduler before a mailbox, and tenants with one run each."""

    def __init__(self, activity: Activity) -> None:
        self.mailbox = Mailbox()
        self.futures = Futures(read_retention_s=60, unread_retention_s=60, max_pending_per_tenant=100)
        self.scheduler = Scheduler(self.mailbox, self.futures, activity, seq_gap_timeout_s=60)
        self._seqs: dict[str, int] = {}

    def run(self, name: str) -> Run:
        moment = now()
        run = Run(name, name, "session", 0, "model", LoraSpec(), "live", moment, moment, {})
        if name not in self._seqs:
            self._seqs[name] = 0
            self.scheduler.open(run, 1)
            self.scheduler.mark_live(name)
        return run

    def submit(self, name: str, work: Any) -> str:
        run = self.run(name)
        self._seqs[name] += 1
        return self.scheduler.submit(run, self._seqs[name], "work", work)

    def loss(self, name: str, *lengths: int) -> str:
        data = tuple(Datum(np.full(length, index), {}) for index, length in enumerate(lengths))
        return self.submit(name, RunLoss(name, data, "cross_entropy"))

    def step(self, name: str) -> str:
        return self.submit(name, OptimStep(name, AdamParams()))

    async def result(self, name: str, future_id: str) -> FutureResult | Failure | Pending:
        return await self.futures.wait(Tenant(name, name), future_id, hold_s=0.0)

    def sent(self) -> list[str]:
        """The adapters of every batch that the engine has got."""
        return [" ".join(str(command.adapter_id) for command in batch) for batch in self.mailbox.batches]


@pytest.fixture(scope="module")
def activity() -> Iterator[Activity]:
    database = open_database("sqlite://")
    yield Activity(Traces(Signer(b"secret")), Usage(UsageTable(database), Projects(()), retention_days=400))
    database.close()


@pytest.fixture
async def rig(activity: Activity) -> Rig:
    return Rig(activity)


async def test_two_passes_are_with_the_engine_and_the_rest_is_decided_later(rig: Rig) -> None:
    large = rig.loss("a", *[100] * 5)
    assert rig.sent() == ["a", "a"]
    small = rig.loss("b", 20)
    assert rig.sent() == ["a", "a"]
    await rig.mailbox.answer(None)
    assert rig.sent() == ["a", "a", "b"]
    await rig.mailbox.answer(None, DONE, None, None, DONE)
    assert await rig.result("b", small) == DONE
    assert await rig.result("a", large) == DONE


async def test_the_pass_that_waits_is_topped_up(rig: Rig) -> None:
    for name in "abcd":
        rig.loss(name, 40)
    assert rig.sent() == ["a", "b", "c"]
    await rig.mailbox.answer(DONE)
    assert rig.sent() == ["a", "b", "c", "d"]


async def test_a_step_and_the_next_losses_follow_without_waiting_for_replies(rig: Rig) -> None:
    loss, step, following = rig.loss("a", 40), rig.step("a"), rig.loss("a", 40)
    assert [type(command) for batch in rig.mailbox.batches for command in batch] == [RunLoss, OptimStep, RunLoss]
    await rig.mailbox.answer(EngineError("no"), STEPPED, DONE)
    assert await rig.result("a", loss) == Failure("no", "server")
    assert await rig.result("a", step) == STEPPED
    assert await rig.result("a", following) == DONE


async def test_a_barrier_waits_for_every_reply_of_its_lane(rig: Rig) -> None:
    async def save() -> FutureResult:
        return await rig.scheduler.ask(OptimStep("saved", AdamParams()))  # type: ignore[no-any-return]

    rig.loss("a", 100, 100, 100)
    rig.submit("a", save)
    following = rig.loss("a", 10)
    await rig.mailbox.answer(None, None)
    assert rig.sent() == ["a", "a", "a"]
    await rig.mailbox.answer(DONE)
    assert rig.sent() == ["a", "a", "a", "saved"]
    await rig.mailbox.answer(STEPPED)
    assert rig.sent()[-1] == "a"
    await rig.mailbox.answer(DONE)
    assert await rig.result("a", following) == DONE


async def test_an_operation_settles_by_its_last_part_with_the_first_error(rig: Rig) -> None:
    future_id = rig.loss("a", 100, 100, 100)
    await rig.mailbox.answer(None, EngineError("first"))
    assert await rig.result("a", future_id) == Pending()
    await rig.mailbox.answer(EngineError("last"))
    assert await rig.result("a", future_id) == Failure("first", "server")


async def test_an_operation_fails_once_when_the_engine_dies_in_the_middle(rig: Rig) -> None:
    future_id, step = rig.loss("a", *[100] * 5), rig.step("a")
    rig.mailbox.generation = 2
    await rig.mailbox.answer(EngineDied("the engine died"), EngineDied("the engine died"))
    assert await rig.result("a", future_id) == Failure("the engine died", "server")
    failed = await rig.result("a", step)
    assert isinstance(failed, Failure)
    assert "was lost when the engine restarted" in failed.message
    assert rig.sent() == ["a", "a"]


async def test_a_run_that_is_closed_in_the_middle_of_an_operation_fails_it_once(rig: Rig) -> None:
    future_id = rig.loss("a", *[100] * 5)
    rig.scheduler.close("a", RunLost("closed"))
    assert await rig.result("a", future_id) == Failure("closed", "user")
    await rig.mailbox.answer(None, None)
    assert await rig.result("a", future_id) == Failure("closed", "user")
    assert rig.mailbox.num_unanswered == 0


async def test_draining_waits_for_what_the_engine_has(rig: Rig) -> None:
    rig.loss("a", 10)
    assert not await rig.scheduler.drain(0.01)
    await rig.mailbox.answer(DONE)
    assert await rig.scheduler.drain(0.01)
