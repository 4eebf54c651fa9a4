from itertools import chain

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
    assert (whole.first, whole.numbers, whole.num_rows) == (0, tuple(range(8)), 512 + 8 * 64)


def test_a_sequence_longer_than_a_pass_stands_alone() -> None:
    short, long = _tokens(1, 2, 3), np.arange(20)
    assert [(c.first, c.numbers, c.num_rows) for c in cut([short, long, short], 8)] == [
        (0, (0,), 3),
        (1, (1,), 20),
        (2, (2,), 3),
    ]


def _answers(prompt: Int64Array, *lasts: int) -> list[Int64Array]:
    return [np.append(prompt, last) for last in lasts]


def test_sequences_that_begin_alike_are_computed_together_wherever_they_stand() -> None:
    one, other = _answers(np.arange(100), 7, 8, 9), _answers(np.arange(100) + 500, 7, 8, 9)
    mixed = list(chain.from_iterable(zip(one, other, strict=True)))
    first, second = cut(mixed, 103)
    assert {first.numbers, second.numbers} == {(0, 2, 4), (1, 3, 5)}
    assert (first.first, first.num_rows) == (0, 103)
    assert (second.first, second.num_rows) == (3, 103)


def test_the_turns_of_a_conversation_share_in_any_order() -> None:
    turns = [np.arange(length) for length in (200, 50, 150, 100)]
    (whole,) = cut(turns, 1000)
    assert (whole.numbers, whole.num_rows) == ((1, 3, 2, 0), 200)


def test_repeated_sequences_keep_the_order_given() -> None:
    one, other = np.arange(50), np.arange(50) + 500
    (whole,) = cut([one, other, one, other], 1000)
    assert whole.numbers in ((0, 2, 1, 3), (1, 3, 0, 2))


def test_the_order_given_is_kept_where_no_other_shares_more() -> None:
    unlike = [np.full(40, number) for number in (5, 3, 9, 1)]
    grouped = [*_answers(np.arange(100) + 500, 9, 8), *_answers(np.arange(100), 8, 9, 7)]
    for sequences in (unlike, grouped):
        (whole,) = cut(sequences, 1000)
        assert whole.numbers == tuple(range(len(sequences)))


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


def _rows_in_order_given(sequences: list[Int64Array], max_rows: int) -> int:
    """Of all passes, if each takes the next sequences as long as they fit."""
    num_rows, passed = 0, list[Int64Array]()
    for sequence in sequences:
        if passed and _num_rows([*passed, sequence]) > max_rows:
            num_rows, passed = num_rows + _num_rows(passed), []
        passed.append(sequence)
    return num_rows + _num_rows(passed)


def _num_rows(sequences: list[Int64Array]) -> int:
    return sum(len(sequence) for sequence in sequences) - sum(shared_with_previous(sequences))


@given(_sequences, st.integers(1, 200))
def test_every_sequence_is_in_one_cut_and_cuts_are_within_the_limit(sequences: list[Int64Array], max_rows: int) -> None:
    cuts = cut(sequences, max_rows)
    numbers = [number for c in cuts for number in c.numbers]
    assert sorted(numbers) == list(range(len(sequences)))
    for c in cuts:
        assert c.numbers == tuple(numbers[c.first : c.first + len(c.numbers)])
        assert c.num_rows == _num_rows([sequences[number] for number in c.numbers])
        assert c.num_rows <= max_rows or len(c.numbers) == 1


@given(_sequences, st.integers(1, 200))
def test_another_order_than_the_one_given_saves_rows(sequences: list[Int64Array], max_rows: int) -> None:
    cuts = cut(sequences, max_rows)
    num_rows, given_rows = sum(c.num_rows for c in cuts), _rows_in_order_given(sequences, max_rows)
    in_order_given = [number for c in cuts for number in c.numbers] == list(range(len(sequences)))
    assert num_rows == given_rows if in_order_given else num_rows < given_rows


@given(_sequences.flatmap(lambda sequences: st.tuples(st.just(sequences), st.permutations(sequences))))
def test_what_fits_one_pass_shares_as_much_in_any_order(orders: tuple[list[Int64Array], list[Int64Array]]) -> None:
    first, second = ([c.num_rows for c in cut(sequences, 10_000)] for sequences in orders)
    assert first == second
