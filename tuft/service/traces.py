"""What each session asked for and when it was done, kept in memory for whoever wants to look at it as a timeline.

The export is Chrome's JSON trace format, which ui.perfetto.dev opens:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import asyncio
import heapq
import json
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tuft.errors import NotFound, refusing
from tuft.records import Session
from tuft.service.signing import Signer

_EPOCH_S = time.time() - time.monotonic()  # a clock that is set while we run bends no span
_MAX_SPANS_PER_SESSION = 20_000
_MAX_SPANS = 100_000
_MAX_SESSIONS = 1_000
_LINK_LIFETIME_S = 3600
_PACKED: dict[str, Any] = {}


@dataclass(slots=True)
class Span:
    """A request from being queued to being settled. ``track`` is the run or sampler that it belongs to; the moments
    are in seconds since the epoch."""

    tenant_id: str
    session_id: str
    base_model: str
    track: str
    name: str
    args: dict[str, Any]
    queued_s: float = field(default_factory=lambda: _now_s())
    started_s: float | None = None
    settled_s: float | None = None
    key_number: int = 0
    _packed: str | None = None
    """``args`` of what is settled: as JSON they take a third."""

    def __post_init__(self) -> None:
        """The spans of a session share their names: a hundred thousand copies of them would be 40 MB."""
        for name in ("tenant_id", "session_id", "base_model", "track", "name"):
            setattr(self, name, sys.intern(getattr(self, name)))

    def start(self) -> None:
        """Its first part is on its way to be computed; later parts change nothing."""
        if self.started_s is None:
            self.started_s = _now_s()

    def settle(self, **outcome: Any) -> None:
        self.settled_s = _now_s()
        # not orjson: it cuts a kilobyte down to what it needs, and the heap keeps the rest as a hole
        self._packed, self.args = json.dumps(self.args | outcome), _PACKED

    def told(self) -> dict[str, Any]:
        """Everything that was said of it."""
        told: dict[str, Any] = self.args if self._packed is None else json.loads(self._packed)
        return told


@dataclass(slots=True)
class _Timeline:
    spans: deque[Span]
    notes: list[tuple[float, str]] = field(default_factory=list)


class Traces:
    """The newest spans of the sessions that were active last. Beyond what all may hold together, the session that holds
    most gives."""

    def __init__(
        self, signer: Signer, max_spans_per_session: int = _MAX_SPANS_PER_SESSION, max_spans: int = _MAX_SPANS
    ) -> None:
        self._signer = signer
        self._max_spans_per_session = max_spans_per_session
        self._max_spans = max_spans
        self._timelines: OrderedDict[str, _Timeline] = OrderedDict()  # that of the quietest session first
        self._num_spans = 0

    def add(self, span: Span) -> None:
        spans = self._timeline(span.session_id).spans
        self._num_spans += len(spans) < self._max_spans_per_session
        spans.append(span)
        if self._num_spans > self._max_spans:
            largest = max((timeline.spans for timeline in self._timelines.values()), key=len)
            for _ in range(1 + len(largest) // 10):  # a tenth at once, so that the search is worth it
                largest.popleft()
                self._num_spans -= 1

    def note(self, session_id: str, text: str) -> None:
        """Something that happened to the session at this moment."""
        self._timeline(session_id).notes.append((_now_s(), text))

    def link(self, session_id: str) -> tuple[str, int]:
        """A signature that is good for an hour instead of a key, and when that hour ends (Unix time)."""
        expires_at_s = int(time.time()) + _LINK_LIFETIME_S
        return self._signer.sign("trace", session_id, expires_at_s=expires_at_s), expires_at_s

    def check_link(self, session_id: str, signature: str, expires_at_s: int) -> None:
        """Raises NotFound unless the signature is ours, and still good."""
        if not self._signer.verifies(signature, "trace", session_id, expires_at_s=expires_at_s):
            error = NotFound("this link is not one of this server's, or is no longer good; ask for a new one")
            raise refusing("trace", session_id, error)

    async def export(self, session: Session) -> bytes:
        """The session's timeline: a track for each run and sampler, with as many lanes as it had requests at once."""
        timeline = self._timelines.get(session.session_id, _Timeline(deque()))
        notes = [(session.created_at.timestamp(), "session created"), *timeline.notes]
        return await asyncio.to_thread(_chrome_json, session, list(timeline.spans), notes)

    def _timeline(self, session_id: str) -> _Timeline:
        timeline = self._timelines.get(session_id)
        if timeline is None:
            timeline = self._timelines[session_id] = _Timeline(deque(maxlen=self._max_spans_per_session))
            if len(self._timelines) > _MAX_SESSIONS:
                _, quietest = self._timelines.popitem(last=False)
                self._num_spans -= len(quietest.spans)
        self._timelines.move_to_end(session_id)
        return timeline


def _now_s() -> float:
    return _EPOCH_S + time.monotonic()


def _chrome_json(session: Session, spans: Sequence[Span], notes: Sequence[tuple[float, str]]) -> bytes:
    until_s = _now_s()
    events = [
        _label("process_name", 0, session.display_name or session.session_id),
        _label("thread_name", 0, "session"),
    ]
    events += [_event("i", 0, text, moment_s, s="p") for moment_s, text in notes]
    for tid, (name, lane) in enumerate(_lanes(spans, until_s), start=1):
        events += [_label("thread_name", tid, name), _label("thread_sort_index", tid, tid)]
        for span in lane:
            events += _slices(span, tid, until_s)
    about = {"session_id": session.session_id, "user_metadata": dict(session.user_metadata)}
    return orjson.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events})


def _lanes(spans: Sequence[Span], until_s: float) -> Iterator[tuple[str, list[Span]]]:
    """The spans of each track, spread over lanes so that none of a lane begins before the one ahead of it has ended:
    slices of one lane that overlap would not be shown."""
    tracks: dict[str, list[Span]] = {}
    for span in spans:
        tracks.setdefault(span.track, []).append(span)
    for track, members in tracks.items():
        lanes: list[list[Span]] = []
        free: list[int] = []
        busy: list[tuple[float, int]] = []
        for span in members:
            while busy and busy[0][0] <= span.queued_s:
                heapq.heappush(free, heapq.heappop(busy)[1])
            number = heapq.heappop(free) if free else len(lanes)
            if number == len(lanes):
                lanes.append([])
            lanes[number].append(span)
            heapq.heappush(busy, (span.settled_s or until_s, number))
        for number, lane in enumerate(lanes):
            yield (track if number == 0 else f"{track} ({number + 1})"), lane


def _slices(span: Span, tid: int, until_s: float) -> Iterator[dict[str, Any]]:
    """The whole request, and in it its time in the queue and its time at work."""
    end_s = span.settled_s or until_s
    started_s = span.started_s or end_s
    yield _slice(tid, span.name, span.queued_s, end_s, span.told())
    yield _slice(tid, "queued", span.queued_s, started_s, {})
    if started_s < end_s:
        yield _slice(tid, "running", started_s, end_s, {})


def _slice(tid: int, name: str, begin_s: float, end_s: float, args: Mapping[str, Any]) -> dict[str, Any]:
    return _event("X", tid, name, begin_s, dur=_us(end_s) - _us(begin_s), cat="request", args=args)


def _event(phase: str, tid: int, name: str, moment_s: float, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "pid": 1, "tid": tid, "name": name, "ts": _us(moment_s), **more}


def _label(kind: str, tid: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if isinstance(value, int) else "name"
    return {"ph": "M", "pid": 1, "tid": tid, "name": kind, "args": {key: value}}


def _us(moment_s: float) -> int:
    return round(moment_s * 1e6)
