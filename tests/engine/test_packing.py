"""Plans: every datum once, budgets kept, and cuts that depend on the operation alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuft.engine.base import RunLoss
from tuft.engine.packing import Chunk, cut, pack, plan
from tuft.types import Datum

lengths_of_operation = st.lists(st.integers(1, 200), min_size=1, max_size=12)
operations_strategy = st.lists(
    st.tuples(lengths_of_operation, st.sampled_from("abc"), st.booleans()), min_size=1, max_size=8
)
MAX_TOKENS = 128


def operation(lengths: list[int], adapter_id: str = "a", backward: bool = True) -> RunLoss:
    data = tuple(Datum(np.arange(length), {"target_tokens": np.arange(length) + 1}) for length in lengths)
    return RunLoss(adapter_id, data, "cross_entropy", backward=backward)


@given(lengths_of_operation)
def test_a_cut_holds_every_sequence_once_within_the_budget(lengths: list[int]) -> None:
    cuts = cut(lengths, MAX_TOKENS)
    assert [index for first, stop, _ in cuts for index in range(first, stop)] == list(range(len(lengths)))
    for first, stop, num_tokens in cuts:
        assert num_tokens == sum(lengths[first:stop])
        assert num_tokens <= MAX_TOKENS or stop - first == 1


@given(operations_strategy)
def test_a_plan_computes_every_datum_once_and_cuts_by_the_operation_alone(
    described: list[tuple[list[int], str, bool]],
) -> None:
    operations = {number: operation(*description) for number, description in enumerate(described)}
    batches = plan(operations, MAX_TOKENS)
    for number, (lengths, _, _) in enumerate(described):
        chunks = [chunk for batch in batches for chunk in batch if chunk.operation == number]
        assert [(chunk.first, chunk.stop, chunk.num_tokens) for chunk in chunks] == cut(lengths, MAX_TOKENS)
    for batch in batches:
        assert len(batch) == 1 or sum(chunk.num_tokens for chunk in batch) <= MAX_TOKENS
        assert len({operations[chunk.operation].backward for chunk in batch}) == 1


@given(operations_strategy)
def test_operations_of_one_adapter_end_in_their_order(described: list[tuple[list[int], str, bool]]) -> None:
    operations = {number: operation(*description) for number, description in enumerate(described)}
    chunks = [chunk.operation for batch in plan(operations, MAX_TOKENS) for chunk in batch]
    for adapter_id in "abc":
        mine = [n for n in chunks if operations[n].adapter_id == adapter_id and operations[n].backward]
        assert mine == sorted(mine)


def test_short_operations_share_a_batch_and_come_before_long_ones() -> None:
    operations = {0: operation([100, 100], "a"), 1: operation([40], "b"), 2: operation([50], "c")}
    assert plan(operations, MAX_TOKENS) == [
        (Chunk(1, 0, 1, 40), Chunk(2, 0, 1, 50)),
        (Chunk(0, 0, 1, 100),),
        (Chunk(0, 1, 2, 100),),
    ]


def test_packing_lays_sequences_end_to_end() -> None:
    soft = Datum(np.array([7, 8]), {"target_tokens": np.array([[1, 2], [3, 4]])})
    operations = [operation([3]), RunLoss("b", (soft, *operation([1]).data), "cross_entropy")]
    packed = pack(operations, (Chunk(0, 0, 1, 3), Chunk(1, 0, 2, 3)))
    assert packed.tokens_T.tolist() == [0, 1, 2, 7, 8, 0]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0]
    assert packed.lengths == (3, 2, 1)
    assert packed.target_rows_M.tolist() == [0, 1, 2, 3, 3, 4, 4, 5]
    assert packed.target_tokens_M.tolist() == [1, 2, 3, 1, 2, 3, 4, 1]
    assert packed.row_bounds == ((0, 3), (3, 6))
    assert packed.target_bounds == ((0, 3), (3, 8))
