import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuft.prefixes import MIN_SHARED_TOKENS, cut, shared_with_previous
from tuft.types import Int64Array

# few distinct tokens and long common beginnings, so that sharing happens
_sequences = st.lists(
    st.tuples(st.integers(1, 2), st.integers(0, 60), st.lists(st.integers(0, 1), min_size=1, max_size=60)).map(
        lambda parts: np.array([parts[0]] * parts[1] + parts[2], dtype=np.int64)
    ),
    max_size=12,
)


def _tokens(*values: int) -> Int64Array:
    return np.array(values, dtype=np.int64)


def test_a_sequence_shares_the_common_beginning_with_the_one_before_it() -> None:
    prompt = np.arange(100)
    first, second = np.concatenate([prompt, [7, 8, 9]]), np.concatenate([prompt, [7, 1]])
    assert shared_with_previous([first, second, first]) == [0, 101, 101]


def test_a_short_common_beginning_is_not_shared() -> None:
    prompt = np.arange(MIN_SHARED_TOKENS - 1)
    assert shared_with_previous([np.append(prompt, 500), np.append(prompt, 600)]) == [0, 0]


def test_a_repeated_sequence_keeps_its_last_token_to_itself() -> None:
    sequence = np.arange(50)
    assert shared_with_previous([sequence, sequence]) == [0, 49]
    assert shared_with_previous([sequence, sequence[:40]]) == [0, 39]


def test_nothing_is_cut_into_nothing() -> None:
    assert shared_with_previous([]) == []
    assert cut([], 10) == []


def test_a_group_of_answers_to_one_prompt_fits_where_its_tokens_would_not() -> None:
    prompt = np.arange(512)
    group = [np.concatenate([prompt, np.full(64, 1000 + answer)]) for answer in range(8)]
    (whole,) = cut(group, 1024)
    assert (whole.first, whole.stop, whole.num_rows) == (0, 8, 512 + 8 * 64)


def test_a_sequence_longer_than_a_pass_stands_alone() -> None:
    short, long = _tokens(1, 2, 3), np.arange(20)
    assert [(c.first, c.stop, c.num_rows) for c in cut([short, long, short], 8)] == [(0, 1, 3), (1, 2, 20), (2, 3, 3)]


@given(_sequences)
def test_what_is_shared_is_equal_and_as_long_as_can_be(sequences: list[Int64Array]) -> None:
    for index, num_shared in enumerate(shared_with_previous(sequences)):
        if index == 0:
            assert num_shared == 0
            continue
        before, here = sequences[index - 1], sequences[index]
        assert num_shared < len(here)
        np.testing.assert_array_equal(before[:num_shared], here[:num_shared])
        limit = min(len(before), len(here) - 1)
        longest = next((n for n in range(limit) if before[n] != here[n]), limit)
        assert num_shared == (longest if longest >= MIN_SHARED_TOKENS else 0)


@given(_sequences, st.integers(1, 200))
def test_cuts_are_consecutive_whole_and_within_the_limit(sequences: list[Int64Array], max_rows: int) -> None:
    cuts = cut(sequences, max_rows)
    assert [index for c in cuts for index in range(c.first, c.stop)] == list(range(len(sequences)))
    for c in cuts:
        part = sequences[c.first : c.stop]
        shared = shared_with_previous(part)
        assert c.num_rows == sum(len(sequence) for sequence in part) - sum(shared)
        assert c.num_rows <= max_rows or c.stop - c.first == 1
