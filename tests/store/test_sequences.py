from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest

from tuft.records import RecordedSequence, Session, Tenant, now
from tuft.store.db import open_database
from tuft.store.sequences import Sequences
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog

ALICE = Tenant("tenant-a", "alice")
LATER, BEFORE = timedelta(hours=1), timedelta(seconds=-1)


@pytest.fixture
def sequences(database_url: str) -> Iterator[Sequences]:
    database = open_database(database_url)
    TenantCatalog(database).ensure_tenant(ALICE)
    for session_id in ("s1", "s2"):
        SessionCatalog(database).add(Session(session_id, ALICE.tenant_id, now(), (), {}, "0.38.0", None))
    yield Sequences(database)
    database.close()


def sequence(sequence_id: str, *tokens: int) -> RecordedSequence:
    logprobs_N = np.linspace(-1, -2, len(tokens), dtype=np.float32)
    return RecordedSequence(sequence_id, np.arange(3), np.array(tokens, dtype=np.int64), logprobs_N)


def test_what_was_recorded_is_found_again(sequences: Sequences) -> None:
    sequences.add(ALICE, "s1", [sequence("a", 5, 49_151), sequence("b", 7)], now() + LATER)
    found = sequences.find("s1", ["a", "b", "c"])
    assert sorted(found) == ["a", "b"]
    assert found["a"].prompt_tokens_P.tolist() == [0, 1, 2]
    assert found["a"].tokens_N.tolist() == [5, 49_151]
    assert found["a"].logprobs_N.tolist() == [-1, -2]


def test_a_sequence_belongs_to_its_session(sequences: Sequences) -> None:
    sequences.add(ALICE, "s1", [sequence("a", 5)], now() + LATER)
    assert sequences.find("s2", ["a"]) == {}


def test_a_request_made_again_replaces_what_it_recorded(sequences: Sequences) -> None:
    for token in (5, 6):
        sequences.add(ALICE, "s1", [sequence("a", token)], now() + LATER)
    assert sequences.find("s1", ["a"])["a"].tokens_N.tolist() == [6]


def test_an_expired_sequence_is_gone_and_one_in_use_is_kept(sequences: Sequences) -> None:
    sequences.add(ALICE, "s1", [sequence("a", 5), sequence("b", 5)], now() + BEFORE)
    assert sequences.find("s1", ["a", "b"]) == {}
    sequences.keep_until("s1", ["a"], now() + LATER)
    sequences.delete_expired()
    sequences.keep_until("s1", ["b"], now() + LATER)
    assert sorted(sequences.find("s1", ["a", "b"])) == ["a"]


def test_more_sequences_than_a_statement_takes_parameters_are_found(sequences: Sequences) -> None:
    ids = [f"q{number}" for number in range(1_200)]
    sequences.add(ALICE, "s1", [sequence(sequence_id, 1) for sequence_id in ids], now() + LATER)
    assert sorted(sequences.find("s1", ids)) == sorted(ids)
