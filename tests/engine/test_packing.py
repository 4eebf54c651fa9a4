"""The layout of a pass, and that a shared beginning computed once gives what it gives computed every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.reference import random_adapter_state, random_data, relative_error
from tests.engine.test_trainer import cross_entropy, gradients_of, load_adapter, run_one, tiny_decoder
from tuft.engine.packing import pack
from tuft.engine.trainer import Trainer
from tuft.models.branches import Branch
from tuft.models.decoder import Precision
from tuft.types import Datum, Float32Array, LoraSpec


def datum(*tokens: int, first_target: int = 100) -> Datum:
    return Datum(np.array(tokens), {"target_tokens": np.arange(len(tokens)) + first_target})


def test_parts_and_their_sequences_lie_end_to_end() -> None:
    soft = Datum(np.array([7, 8]), {"target_tokens": np.array([[1, 2], [3, 4]])})
    packed = pack([[datum(0, 1, 2)], [soft, datum(0)]], share_prefixes=True)
    assert packed.tokens_T.tolist() == [0, 1, 2, 7, 8, 0]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 1, 0]
    assert packed.branches == (Branch(0, 3), Branch(3, 5), Branch(5, 6))
    assert packed.target_rows_M.tolist() == [0, 1, 2, 3, 3, 4, 4, 5]
    assert packed.target_tokens_M.tolist() == [100, 101, 102, 1, 2, 3, 4, 100]
    assert packed.row_bounds == ((0, 3), (3, 6))
    assert packed.target_bounds == ((0, 3), (3, 8))
    assert [order.tolist() for order in packed.target_orders] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_a_shared_beginning_has_rows_once_and_the_targets_of_all() -> None:
    prompt = tuple(range(40))
    data = [datum(*prompt, 50, 51), datum(*prompt, 60, first_target=200), datum(*prompt, 60, 61, first_target=300)]
    packed = pack([[datum(1)], data], share_prefixes=True)
    assert packed.tokens_T.tolist() == [1, *prompt, 50, 51, 60, 61]
    assert packed.positions_T.tolist() == [0, *range(42), 40, 41]
    assert packed.branches == (
        Branch(0, 1),
        Branch(1, 43),
        Branch(43, 44, ((1, 41),)),
        Branch(44, 45, ((1, 41), (43, 44))),
    )
    assert packed.row_bounds == ((0, 1), (1, 45))
    (_, order) = packed.target_orders
    data_M = np.repeat([0, 1, 2], [42, 41, 42])[order]
    position_M = np.concatenate([np.arange(42), np.arange(41), np.arange(42)])[order]
    assert packed.target_tokens_M[1:].tolist() == (100 * (data_M + 1) + position_M).tolist()
    assert packed.target_rows_M[1:4].tolist() == [1, 1, 1]
    assert packed.target_rows_M[-5:].tolist() == [41, 42, 43, 43, 44]
    assert (np.diff(packed.target_rows_M) >= 0).all()


def test_unshared_every_sequence_has_rows_of_its_own() -> None:
    prompt = tuple(range(40))
    packed = pack([[datum(*prompt, 50), datum(*prompt, 60)]], share_prefixes=False)
    assert packed.branches == (Branch(0, 41), Branch(41, 82))


def tree(lengths: Sequence[tuple[int, int]], seed: int = 0) -> tuple[Datum, ...]:
    """Each sequence: how many tokens it shares with the one before it, and how many of its own follow. All targets
    and weights are its own, on the shared part too."""
    rng = np.random.default_rng(seed)
    data: list[Datum] = []
    for num_shared, num_own in lengths:
        before = data[-1].tokens_T[:num_shared] if data else np.arange(0)
        (own,) = random_data(384, (num_shared + num_own,), seed=int(rng.integers(1000)))
        data.append(replace(own, tokens_T=np.concatenate([before, own.tokens_T[num_shared:]])))
    return tuple(data)


TREES = {
    "answers of one length": [(0, 80 + 16), *[(80, 16)] * 5],
    "ragged answers": [(0, 50), (40, 1), (40, 33), (40, 7), (40, 140), (40, 2)],
    "three levels": [(0, 60), (50, 40), (85, 1), (85, 39), (60, 40), (50, 20), (0, 9), (0, 30)],
    "long prefix": [(0, 400), (390, 30), (390, 1), (390, 69)],
    "duplicates": [(0, 45), (44, 1), (44, 1), (45, 10)],
}


def trained(
    precision: Precision, data: tuple[Datum, ...], share_prefixes: bool, backward: bool = True
) -> tuple[list[Float32Array], Float32Array, float]:
    """Logprobs, gradients and loss."""
    decoder = tiny_decoder(precision)
    adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))
    trainer = Trainer(decoder, 4096, share_prefixes)
    result = run_one(trainer, cross_entropy("a", data, backward), adapter)
    gradients = gradients_of(adapter).numpy() if backward else np.zeros(1, dtype=np.float32)
    return list(result.logprobs), gradients, result.metrics["loss:sum"]


@pytest.mark.parametrize("lengths", TREES.values(), ids=TREES)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bf16", 0.04)])
def test_shared_beginnings_give_what_whole_sequences_give(
    precision: Precision, tolerance: float, lengths: list[tuple[int, int]]
) -> None:
    data = tree(lengths)
    shared_logprobs, shared_gradients, shared_loss = trained(precision, data, share_prefixes=True)
    whole_logprobs, whole_gradients, whole_loss = trained(precision, data, share_prefixes=False)
    for datum_, shared, whole in zip(data, shared_logprobs, whole_logprobs, strict=True):
        assert shared.shape == datum_.loss_fn_inputs["target_tokens"].shape
        np.testing.assert_allclose(shared, whole, atol=2 * tolerance, rtol=2 * tolerance)
    assert shared_loss == pytest.approx(whole_loss, abs=10 * tolerance, rel=tolerance)
    assert relative_error(shared_gradients, whole_gradients) < tolerance


def test_a_forward_shares_beginnings_too() -> None:
    data = tree(TREES["ragged answers"])
    forward, _, _ = trained("float32", data, share_prefixes=True, backward=False)
    backward, _, _ = trained("float32", data, share_prefixes=True)
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
