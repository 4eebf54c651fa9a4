"""What data say of where they come from is checked against what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tuft.errors import InvalidInput
from tuft.records import Run, Session, Tenant, now
from tuft.service.provenance import Provenance
from tuft.store.db import open_database
from tuft.store.sequences import Sequences
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.types import Datum, LoraSpec, ProvenanceSpan, SampledSequence, SampleResult

ALICE = Tenant("tenant-a", "alice")
PROMPT, TOKENS, LOGPROBS = (10, 11, 12), (20, 21, 22), (-1.0, -2.0, -3.0)


def run_in(session_id: str) -> Run:
    moment = now()
    return Run(f"{session_id}:train:0", ALICE.tenant_id, session_id, 0, "m", LoraSpec(), "live", moment, moment, {})


@pytest.fixture
def provenance(database_url: str) -> Iterator[Provenance]:
    """Session s1 has sampled the sequence "q"."""
    database = open_database(database_url)
    TenantCatalog(database).ensure_tenant(ALICE)
    SessionCatalog(database).add(Session("s1", ALICE.tenant_id, now(), (), {}, "0.38.0", None))
    found = Provenance(Sequences(database))
    sampled = SampledSequence(np.array(TOKENS), np.array(LOGPROBS, dtype=np.float32), "length")
    found.record(ALICE, "s1", ["q"], PROMPT, SampleResult((sampled,)))
    yield found
    database.close()


def prompt(length: int, offset: int = 0, sequence_id: str = "q") -> ProvenanceSpan:
    return ProvenanceSpan(sequence_id, False, offset, length)


def sampled(length: int, offset: int = 0, sequence_id: str = "q") -> ProvenanceSpan:
    return ProvenanceSpan(sequence_id, True, offset, length)


def datum(**changes: Any) -> Datum:
    """The sequence as a trainer sends it: inputs all but the last token, targets shifted, 0 in the prompt."""
    inputs = {
        "target_tokens": np.array([0, 0, *TOKENS]),
        "advantages": np.array([0, 0, 1, 0, -1], dtype=np.float32),
        "logprobs": np.full(5, -9, dtype=np.float32),
    }
    given = Datum(np.array([*PROMPT, *TOKENS[:-1]]), inputs, (prompt(3), sampled(2)), (prompt(2, offset=1), sampled(3)))
    return replace(given, **changes)


def with_input(name: str, values: npt.ArrayLike) -> Datum:
    given = datum()
    return replace(given, loss_fn_inputs={**given.loss_fn_inputs, name: np.array(values)})


def test_logprobs_come_from_the_record_and_not_from_the_client(provenance: Provenance) -> None:
    (resolved,) = provenance.resolve(run_in("s1"), [datum()])
    assert resolved.loss_fn_inputs["logprobs"].tolist() == [0, 0, *LOGPROBS]
    assert resolved.loss_fn_inputs["is_sampled"].tolist() == [0, 0, 1, 1, 1]


def test_a_part_of_a_sequence_may_be_trained_on(provenance: Provenance) -> None:
    part = Datum(
        np.array([20]),
        {"target_tokens": np.array([21]), "advantages": np.ones(1, dtype=np.float32)},
        (sampled(1),),
        (prompt(0), sampled(1, offset=1)),
    )
    (resolved,) = provenance.resolve(run_in("s1"), [part])
    assert resolved.loss_fn_inputs["logprobs"].tolist() == [-2]


WRONG = {
    "no spans at all": (datum(input_spans=(), target_spans=()), r"data\[0\].model_input_spans: got 'none'"),
    "too few tokens": (datum(input_spans=(prompt(3),)), "3 tokens in all'; must cover all 5 tokens"),
    "an unknown sequence": (datum(input_spans=(prompt(5, sequence_id="x"),)), r"model_input_spans\[0\].sequence_id"),
    "beyond the prompt": (datum(input_spans=(prompt(4), sampled(1))), "within the 3 tokens of its prompt"),
    "beyond the sequence": (datum(target_spans=(prompt(1), sampled(4))), "within the 3 tokens of the sequence"),
    "a negative length": (datum(target_spans=(prompt(-1), sampled(3))), "offset 0, length -1"),
    "another input token": (datum(tokens_T=np.array([10, 11, 13, 20, 21])), "has token 12 there"),
    "another target": (with_input("target_tokens", [0, 0, 20, 21, 23]), r"loss_fn_input_spans\[1\], its token 2"),
    "soft targets": (
        with_input("target_tokens", np.ones((5, 2), dtype=np.int64)),
        r"target_tokens: got 'shape \[5, 2\]'",
    ),
    "an advantage on the prompt": (with_input("advantages", [1, 0, 0, 0, 0]), r"advantages\[0\]: got 1; must be 0"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_as_it_says_is_named(provenance: Provenance, wrong: Datum, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        provenance.resolve(run_in("s1"), [wrong])


def test_many_data_are_resolved_in_their_order_and_a_wrong_one_is_named_by_its_place(provenance: Provenance) -> None:
    resolved = provenance.resolve(run_in("s1"), [datum()] * 150)
    assert len(resolved) == 150
    with pytest.raises(InvalidInput, match=r"data\[149\].model_input_spans"):
        provenance.resolve(run_in("s1"), [*[datum()] * 149, datum(input_spans=())])


def test_another_session_cannot_train_on_it(provenance: Provenance) -> None:
    with pytest.raises(InvalidInput, match="that this session sampled"):
        provenance.resolve(run_in("s2"), [datum()])


def test_a_run_is_told_once_whose_objective_it_trains(provenance: Provenance) -> None:
    assert [provenance.is_news_to(run_id) for run_id in ("r1", "r1", "r2")] == [True, False, True]
