from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from tuft.app import open_store
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.errors import StorageError
from tuft.service import housekeeping
from tuft.service.housekeeping import Housekeeping
from tuft.service.services import Services


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "_INTERVAL_S", 0.01)


async def test_the_sweep_that_runs_has_ended_when_stop_returns() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(10)
        ended.set()

    house = Housekeeping((lambda: asyncio.to_thread(work),))
    house.start()
    await asyncio.to_thread(began.wait, 10)
    stopping = asyncio.create_task(house.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    may_end.set()
    await stopping
    assert ended.is_set()


async def test_a_sweep_that_fails_comes_again_and_the_others_are_done() -> None:
    calls: list[str] = []
    is_enough = asyncio.Event()

    async def refused() -> None:
        calls.append("refused")
        raise StorageError("the disk is full")

    async def wrong() -> None:
        calls.append("wrong")
        raise ZeroDivisionError

    async def last() -> None:
        calls.append("last")
        if len(calls) >= 6:
            is_enough.set()

    house = Housekeeping((refused, wrong, last))
    house.start()
    await asyncio.wait_for(is_enough.wait(), 10)
    await house.stop()
    assert calls[:6] == ["refused", "wrong", "last"] * 2


async def test_a_server_whose_database_refuses_its_last_sweeps_stops_all_the_same(
    config_file: Path, engine: EngineProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = set(threading.enumerate())
    config = load_config(config_file, home=tmp_path)
    database = open_store(config)
    running = Services(config, database, engine)
    await running.start()
    with database.engine.begin() as connection:
        connection.execute(text("DROP TABLE server_clock"))
    await running.stop()
    assert "housekeeping failed" in capsys.readouterr().out
    assert "journal-writer" not in {thread.name for thread in set(threading.enumerate()) - others}
    database.close()
