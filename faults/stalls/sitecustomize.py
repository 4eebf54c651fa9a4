"""Imported by a server's interpreter that has this directory in its ``PYTHONPATH``: writes down every callback that
holds the event loop for long, by the thread's own time: the clock would also tell of the machine's other work."""

from __future__ import annotations

import asyncio
import os
import time

_LONG_S = 0.01
_FILE = os.environ.get("FAULTS_STALLS")


def _watch(file: str) -> None:
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began_s = time.thread_time()
        run(handle)
        took_s = time.thread_time() - began_s
        if took_s > _LONG_S:
            with open(file, "a") as opened:  # noqa: PTH123
                opened.write(f"{took_s * 1e3:.1f} {handle!r:.300}\n")

    asyncio.events.Handle._run = timed  # type: ignore[method-assign, assignment]


if _FILE:
    _watch(_FILE)
