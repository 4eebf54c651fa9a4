"""Timelines: what they show, that they can be shown, and that they stay small."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from tuft.errors import NotFound
from tuft.records import Session, now
from tuft.service.signing import Signer
from tuft.service.traces import Span, Traces

SIGNER = Signer(b"secret")


def session(session_id: str = "s") -> Session:
    return Session(session_id, "tenant", now(), (), {"k": "v"}, "0", "nightly")


def span(queued_s: float, started_s: float | None, settled_s: float | None, track: str = "run", **args: Any) -> Span:
    return Span("tenant", "s", "model", track, "forward_backward", args, queued_s, started_s, settled_s)


async def events(traces: Traces, session_id: str = "s") -> list[dict[str, Any]]:
    exported = json.loads(await traces.export(session(session_id)))
    assert exported["otherData"] == {"session_id": session_id, "user_metadata": {"k": "v"}}
    found: list[dict[str, Any]] = exported["traceEvents"]
    return found


def slices(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["ph"] == "X"]


async def test_a_span_is_a_slice_with_its_wait_and_its_work_in_it() -> None:
    traces = Traces(SIGNER)
    traces.add(span(1.0, 1.25, 2.0, seq=3))
    shown = [(event["name"], event["ts"], event["dur"]) for event in slices(await events(traces))]
    assert shown == [
        ("forward_backward", 1_000_000, 1_000_000),
        ("queued", 1_000_000, 250_000),
        ("running", 1_250_000, 750_000),
    ]
    assert slices(await events(traces))[0]["args"] == {"seq": 3}


async def test_a_span_that_failed_in_the_queue_never_ran_and_a_pending_one_lasts_until_now() -> None:
    traces = Traces(SIGNER)
    traces.add(span(1.0, None, 2.0))
    assert [event["name"] for event in slices(await events(traces))] == ["forward_backward", "queued"]
    traces = Traces(SIGNER)
    traces.add(Span("tenant", "s", "model", "run", "optim_step", {}))
    pending = slices(await events(traces))[0]
    assert abs(pending["ts"] + pending["dur"] - now().timestamp() * 1e6) < 5e6


async def test_slices_of_one_lane_never_overlap_and_every_span_is_in_one() -> None:
    traces = Traces(SIGNER)
    for number in range(40):
        begin_s = number * 0.5
        traces.add(span(begin_s, begin_s + 0.1, begin_s + 0.3 + 0.4 * (number % 5), track=f"run {number % 2}"))
    found = await events(traces)
    lanes = defaultdict(list)
    for event in slices(found):
        if event["name"] == "forward_backward":
            lanes[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, lanes.values())) == 40
    assert len(lanes) == 4
    for lane in lanes.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(lane))
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert sorted(names[tid] for tid in lanes) == ["run 0", "run 0 (2)", "run 1", "run 1 (2)"]


async def test_what_the_session_did_besides_is_marked() -> None:
    traces = Traces(SIGNER)
    traces.note("s", "client finished: success")
    assert [event["name"] for event in await events(traces) if event["ph"] == "i"] == [
        "session created",
        "client finished: success",
    ]


async def test_a_session_keeps_its_newest_spans_and_the_largest_gives_first() -> None:
    traces = Traces(SIGNER, max_spans_per_session=50, max_spans=100)
    for number in range(60):
        traces.add(span(number, number, number + 1, seq=number))
    kept = [event["args"]["seq"] for event in slices(await events(traces)) if event["name"] == "forward_backward"]
    assert kept == list(range(10, 60))
    for number in range(60):
        other = "t" if number % 2 else "u"
        traces.add(Span("tenant", other, "model", "run", "sample", {}, number + 1, number + 1, number + 2))
    sizes = {name: len(slices(await events(traces, name))) // 3 for name in ("s", "t", "u")}
    assert sizes["t"] == sizes["u"] == 30
    assert sum(sizes.values()) <= 100


async def test_a_thousand_sessions_are_remembered_and_the_quietest_leaves() -> None:
    traces = Traces(SIGNER)
    for number in range(1000):
        traces.note(f"s{number}", "x")
    traces.note("s0", "y")
    traces.note("s1000", "x")
    notes = {
        name: [event["name"] for event in await events(traces, name) if event["ph"] == "i"][1:]
        for name in ("s0", "s1", "s1000")
    }
    assert notes == {"s0": ["x", "y"], "s1": [], "s1000": ["x"]}


def test_a_link_is_to_one_session_for_an_hour() -> None:
    traces = Traces(SIGNER)
    signature, expires_at_s = traces.link("s")
    traces.check_link("s", signature, expires_at_s)
    for session_id, moment in (("t", expires_at_s), ("s", expires_at_s + 1)):
        with pytest.raises(NotFound):
            traces.check_link(session_id, signature, moment)
    assert 3590 < expires_at_s - now().timestamp() <= 3600
