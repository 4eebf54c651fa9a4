from __future__ import annotations

from pathlib import Path

from tuft.records import SamplingClient
from tuft.store.awaited import AwaitedSamples
from tuft.store.db import open_database, sqlite_url

CLIENT = SamplingClient("s1:sample:0", 2**33)


def test_what_is_awaited_outlives_the_server(tmp_path: Path) -> None:
    for expected in ({}, {"a": CLIENT, "b": CLIENT}):
        database = open_database(sqlite_url(tmp_path))
        awaited = AwaitedSamples(database)
        assert awaited.all() == expected
        if not expected:
            for request_id in ("a", "b", "c"):
                awaited.add(request_id, CLIENT)
            awaited.remove({"c", "unknown"})
            awaited.remove(())
        database.close()
