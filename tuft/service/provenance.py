"""Where the tokens of training data come from: sequences recorded when they were sampled, and data that name them.

``stable_reinforce`` takes the log-probabilities at sampling from the record, not from the client, and checks that what
a datum says of itself is so. A record belongs to the session in which it was sampled. It is kept for a day, and every
training request that uses it starts that day again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta

import numpy as np
import numpy.typing as npt

from tuft.errors import InvalidInput, refusing
from tuft.records import RecordedSequence, Run, Tenant, now
from tuft.store.sequences import Sequences
from tuft.types import Datum, Float32Array, Int64Array, ProvenanceSpan, SampleResult

RETENTION = timedelta(days=1)
_MAX_INFORMED = 10_000
_DATA_AT_ONCE = 64  # every sequence comes with its prompt: not those of all data at once


class Provenance:
    """Recorded sequences of all sessions."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._informed: dict[str, None] = {}  # runs, oldest first

    def is_news_to(self, run_id: str) -> bool:
        """True the first time that a run asks for a loss whose objective is ours and not Tinker's."""
        if run_id in self._informed:
            return False
        self._informed[run_id] = None
        if len(self._informed) > _MAX_INFORMED:
            del self._informed[next(iter(self._informed))]
        return True

    def record(
        self,
        tenant: Tenant,
        session_id: str,
        sequence_ids: Sequence[str],
        prompt_tokens: Sequence[int],
        result: SampleResult,
    ) -> None:
        """Keep what a sample request has sampled."""
        prompt_tokens_P = np.asarray(prompt_tokens, dtype=np.int64)
        sequences = [
            RecordedSequence(sequence_id, prompt_tokens_P, sampled.tokens_N, sampled.logprobs_N)
            for sequence_id, sampled in zip(sequence_ids, result.sequences, strict=True)
        ]
        self._sequences.add(tenant, session_id, sequences, now() + RETENTION)

    def resolve(self, run: Run, data: Sequence[Datum]) -> tuple[Datum, ...]:
        """``data`` with the inputs ``logprobs``, as they were recorded, and ``is_sampled``: 1 at targets that were
        sampled. What the client sent under these names does not count.

        Raises InvalidInput that names datum and span if anything is not as the data say.
        """
        resolved: list[Datum] = []
        used: dict[str, None] = {}
        for first in range(0, len(data), _DATA_AT_ONCE):
            block = data[first : first + _DATA_AT_ONCE]
            spans = [span for datum in block for span in (*datum.input_spans, *datum.target_spans)]
            ids = dict.fromkeys(span.sequence_id for span in spans)
            records = self._sequences.find(run.session_id, ids)
            resolved += [_resolved(datum, f"data[{first + i}]", records) for i, datum in enumerate(block)]
            used |= ids
        self._sequences.keep_until(run.session_id, used, now() + RETENTION)
        return tuple(resolved)

    async def sweep(self) -> None:
        await asyncio.to_thread(self._sequences.delete_expired)


def _resolved(datum: Datum, where: str, records: Mapping[str, RecordedSequence]) -> Datum:
    target_tokens_T = np.asarray(datum.loss_fn_inputs["target_tokens"])
    if target_tokens_T.ndim != 1:
        seen, allowed = (
            f"shape {list(target_tokens_T.shape)}",
            f"must be [{datum.num_tokens}]: a token was sampled alone",
        )
        raise InvalidInput(f"{where}.loss_fn_inputs.target_tokens", seen, allowed)
    inputs, targets = f"{where}.model_input_spans", f"{where}.loss_fn_input_spans"
    _check_spans(datum.input_spans, inputs, datum.num_tokens, records)
    _check_spans(datum.target_spans, targets, datum.num_tokens, records)
    position = 0
    for index, span in enumerate(datum.input_spans):
        _check_tokens(span, f"{inputs}[{index}]", datum.tokens_T[position : position + span.length], records)
        position += span.length
    logprobs_T = np.zeros(datum.num_tokens, dtype=np.float32)
    is_sampled_T = np.zeros(datum.num_tokens, dtype=np.float32)
    position = 0
    for index, span in enumerate(datum.target_spans):
        covered = slice(position, position + span.length)
        if span.is_sampled:  # targets in a prompt may be anything, since nothing is learned there: the cookbook has 0
            _check_tokens(span, f"{targets}[{index}]", target_tokens_T[covered], records)
            logprobs_T[covered] = records[span.sequence_id].logprobs_N[span.offset : span.offset + span.length]
            is_sampled_T[covered] = 1
        position += span.length
    _check_advantages(f"{where}.loss_fn_inputs.advantages", datum.loss_fn_inputs["advantages"], is_sampled_T)
    recorded = {"logprobs": logprobs_T, "is_sampled": is_sampled_T}
    return Datum(datum.tokens_T, {**datum.loss_fn_inputs, **recorded})


def _check_spans(
    spans: Sequence[ProvenanceSpan], where: str, num_tokens: int, records: Mapping[str, RecordedSequence]
) -> None:
    """They tile ``num_tokens`` tokens, and lie within sequences that were recorded."""
    if not spans:
        raise InvalidInput(where, "none", "stable_reinforce needs them: Datum.with_provenance() sets both")
    for index, span in enumerate(spans):
        record = records.get(span.sequence_id)
        if record is None:
            error = InvalidInput(
                f"{where}[{index}].sequence_id",
                span.sequence_id,
                "must be a sequence that this session sampled with record_stability_info=True, and that was sampled or "
                f"trained on within {RETENTION.days} day",
            )
            raise refusing("sequence", span.sequence_id, error)
        limit = len(_source(span, record))
        if span.offset < 0 or span.length < 0 or span.offset + span.length > limit:
            whose = "the sequence" if span.is_sampled else "its prompt"
            seen = f"offset {span.offset}, length {span.length}"
            raise InvalidInput(f"{where}[{index}]", seen, f"must lie within the {limit} tokens of {whose}")
    covered = sum(span.length for span in spans)
    if covered != num_tokens:
        raise InvalidInput(where, f"{covered} tokens in all", f"must cover all {num_tokens} tokens, once")


def _check_tokens(
    span: ProvenanceSpan, where: str, tokens: Int64Array, records: Mapping[str, RecordedSequence]
) -> None:
    recorded = _source(span, records[span.sequence_id])[span.offset : span.offset + span.length]
    differing = np.flatnonzero(tokens != recorded)
    if differing.size:
        position = int(differing[0])
        allowed = f"the sequence it names has token {int(recorded[position])} there"
        raise InvalidInput(f"{where}, its token {position}", int(tokens[position]), allowed)


def _check_advantages(where: str, advantages_T: npt.NDArray[np.generic], is_sampled_T: Float32Array) -> None:
    stray = np.flatnonzero((advantages_T != 0) & (is_sampled_T == 0))
    if stray.size:
        allowed = "must be 0: by loss_fn_input_spans this target was not sampled"
        raise InvalidInput(f"{where}[{int(stray[0])}]", advantages_T[stray[0]].item(), allowed)


def _source(span: ProvenanceSpan, record: RecordedSequence) -> Int64Array:
    return record.tokens_N if span.is_sampled else record.prompt_tokens_P
