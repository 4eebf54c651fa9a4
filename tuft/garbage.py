"""Garbage collection that leaves the event loop its time.

With thousands of connections the process holds a million objects, and Python looks at all of them whenever their number
has grown by a quarter: 0.3 s each time, in which nobody is served. Reference counts free nearly everything here; what
is left are cycles, which can wait.
"""

from __future__ import annotations

import asyncio
import gc
import time

_YOUNG, _MIDDLE, _NEVER = 20_000, 5, 2**31 - 1
_INTERVAL_S = 60.0
_SHARE = 0.005
"""Of the time, at most, for collections of everything: 99 of 100 requests do not meet one."""


def settle() -> None:
    """What is there now stays, and is not looked at again; from now on only young objects are, by themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)


async def serve() -> None:
    """Collect everything now and then; runs until cancelled."""
    pause_s = _INTERVAL_S
    while True:
        await asyncio.sleep(pause_s)
        began_s = time.monotonic()
        gc.collect()
        pause_s = max(_INTERVAL_S, (time.monotonic() - began_s) / _SHARE)
