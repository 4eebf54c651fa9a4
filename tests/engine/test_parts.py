"""Operations that come in parts: one result, one error, and gradients only when all of it has succeeded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.reference import random_adapter_state, random_data, relative_error
from tests.engine.test_packing import tree
from tests.engine.test_trainer import (
    cross_entropy,
    gradients_of,
    in_parts,
    known_loss,
    load_adapter,
    neighbour,
    raising,
    run_all,
    run_one,
    tiny_decoder,
    without_weights,
)
from tuft.engine.base import RunLoss
from tuft.engine.losses import Loss
from tuft.engine.packing import pack
from tuft.engine.trainer import Trainer
from tuft.errors import EngineError, InvalidInput, UserError
from tuft.models.decoder import Decoder, Precision
from tuft.models.lora import Adapter
from tuft.types import Datum, LoraSpec, LossResult

LENGTHS = (30, 9, 17, 40, 2, 17, 33)


def new_adapter(decoder: Decoder) -> Adapter:
    return load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))


def data_of(lengths: tuple[int, ...] = LENGTHS) -> tuple[Datum, ...]:
    return random_data(384, lengths)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_operation_in_parts_is_the_whole_operation(precision: Precision) -> None:
    decoder = tiny_decoder(precision)
    whole, cut_up = new_adapter(decoder), new_adapter(decoder)
    expected = run_one(Trainer(decoder, 4096), cross_entropy("a", data_of()), whole)
    result = run_one(Trainer(decoder, 48), cross_entropy("a", data_of()), cut_up)
    assert result.metrics == expected.metrics
    assert all(np.array_equal(a, b) for a, b in zip(result.logprobs, expected.logprobs, strict=True))
    error = relative_error(gradients_of(cut_up).numpy(), gradients_of(whole).numpy())
    assert error < (1e-6 if precision == "float32" else 1e-2)


def shuffled_groups() -> tuple[Datum, ...]:
    """Four answers to each of three prompts of 50 tokens, the first answers first, then the second, ...; one of them
    has two targets a token."""
    groups = [tree([(0, 60), (50, 20), (50, 30), (50, 12)], seed) for seed in range(3)]
    data = [datum for answers in zip(*groups, strict=True) for datum in answers]
    inputs = data[4].loss_fn_inputs.items()
    data[4] = replace(data[4], loss_fn_inputs={name: np.stack([given, given[::-1]], axis=1) for name, given in inputs})
    return tuple(data)


@pytest.mark.parametrize("max_rows", [100, 1000])
def test_data_in_any_order_share_beginnings_and_come_back_in_theirs(max_rows: int) -> None:
    decoder, data = tiny_decoder("float32"), shuffled_groups()
    together, alone = new_adapter(decoder), new_adapter(decoder)
    trainer, operation = Trainer(decoder, max_rows), cross_entropy("a", data)
    parts = in_parts(operation, max_rows)
    assert sum(len(pack([part.data], True).tokens_T) for part in parts) < 0.7 * operation.num_tokens
    assert len(parts) == (6 if max_rows == 100 else 1)
    result = run_one(trainer, operation, together)
    expected = [run_one(trainer, cross_entropy("a", (datum,)), alone) for datum in data]
    for logprobs, of_one in zip(result.logprobs, expected, strict=True):
        np.testing.assert_allclose(logprobs, of_one.logprobs[0], rtol=0, atol=1e-5)
    assert result.metrics["loss:sum"] == pytest.approx(sum(of_one.metrics["loss:sum"] for of_one in expected), rel=1e-6)
    assert relative_error(gradients_of(together).numpy(), gradients_of(alone).numpy()) < 1e-6


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_parts_fused_with_others_are_bit_equal_to_parts_alone(precision: Precision) -> None:
    """Each part in a pass with other tenants' parts; the last two in one pass."""
    decoder, data = tiny_decoder(precision), (*data_of(), *tree([(0, 60), (50, 40), (50, 20)]), *data_of((150,)))
    alone, fused = new_adapter(decoder), new_adapter(decoder)
    operation = cross_entropy("mine", data)
    expected = run_one(Trainer(decoder, 96), operation, alone)

    trainer, parts = Trainer(decoder, 96), in_parts(operation, 96)
    assert len(parts) > 3
    result: object = None
    for number, mine in enumerate([*([part] for part in parts[:-2]), parts[-2:]]):
        others = [neighbour(decoder, 2 * number), neighbour(decoder, 2 * number + 1)]
        adapters = {other.adapter_id: load_adapter(decoder, state) for other, state in others} | {"mine": fused}
        assert result is None
        *_, result, _ = run_all(trainer, [others[0][0], *mine, others[1][0]], adapters)

    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert all(np.array_equal(a, b) for a, b in zip(result.logprobs, expected.logprobs, strict=True))
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def test_gradients_reach_the_adapter_with_the_last_part_only() -> None:
    decoder = tiny_decoder("float32")
    adapter, trainer = new_adapter(decoder), Trainer(decoder, 48)
    first, *middle, last = in_parts(cross_entropy("a", data_of()), 48)
    for part in (first, *middle):
        assert run_all(trainer, [part], {"a": adapter}) == [None]
        assert adapter.gradients_P is None
    assert isinstance(run_all(trainer, [last], {"a": adapter})[0], LossResult)
    assert gradients_of(adapter).any()


def test_operations_of_one_run_may_take_turns() -> None:
    decoder = tiny_decoder("float32")
    adapter, trainer = new_adapter(decoder), Trainer(decoder, 48)
    one = in_parts(cross_entropy("a", data_of()), 48, "one")
    two = in_parts(cross_entropy("a", data_of((40, 40)), backward=False), 48, "two")
    assert len(two) == 2
    run_all(trainer, [one[0], two[0]], {"a": adapter})
    assert isinstance(run_all(trainer, [two[1], one[1]], {"a": adapter})[0], LossResult)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_failed_part_fails_those_that_follow_with_the_same_error(culprit: int) -> None:
    decoder = tiny_decoder("float32")
    adapter, trainer = new_adapter(decoder), Trainer(decoder, 48)
    data = list(data_of((30, 30, 30)))
    tokens_T = np.where(np.arange(30) == 4, 384, data[culprit].tokens_T)
    data[culprit] = replace(data[culprit], tokens_T=tokens_T)
    parts = in_parts(cross_entropy("a", tuple(data)), 48)
    replies = [run_all(trainer, [part], {"a": adapter})[0] for part in parts]
    assert replies[:culprit] == [None] * culprit
    assert str(replies[culprit]) == f"data[{culprit}].model_input[4]: got 384; token ids of the model are 0 to 383"
    assert all(reply is replies[culprit] for reply in replies[culprit:])
    assert adapter.gradients_P is None
    run_one(trainer, cross_entropy("a", data_of()), adapter)  # under the same operation_id: the failure is forgotten


def test_what_is_not_finite_is_named_by_its_place_in_the_operation() -> None:
    decoder = tiny_decoder("float32")
    adapter, trainer = new_adapter(decoder), Trainer(decoder, 48)
    fine, datum = data_of((30, 30))
    huge = replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "weights": np.full(30, 3e38, np.float32)})
    first, second = in_parts(cross_entropy("a", (fine, huge)), 48)
    reply, error = run_all(trainer, [first, second], {"a": adapter})
    assert reply is None
    assert isinstance(error, UserError)
    assert "data[1].loss_fn_inputs" in str(error)
    assert adapter.gradients_P is None


@pytest.mark.parametrize("culprit", range(12))
def test_a_datum_computed_out_of_order_is_named_by_its_place_in_the_operation(culprit: int) -> None:
    decoder, good = tiny_decoder("float32"), shuffled_groups()
    inputs = good[culprit].loss_fn_inputs
    bad_target = inputs | {"target_tokens": np.full_like(inputs["target_tokens"], 384)}
    huge_weight = inputs | {"weights": np.full_like(inputs["weights"], 3e38)}
    for bad, message in (
        (bad_target, f"data[{culprit}].loss_fn_inputs.target_tokens[0]"),
        (huge_weight, f"data[{culprit}].loss_fn_inputs: the loss is not finite"),
    ):
        data = [*good]
        data[culprit] = replace(data[culprit], loss_fn_inputs=bad)
        adapter, trainer = new_adapter(decoder), Trainer(decoder, 100)
        replies = [
            run_all(trainer, [part], {"a": adapter})[0] for part in in_parts(cross_entropy("a", tuple(data)), 100)
        ]
        assert message in str(replies[-1])
        assert adapter.gradients_P is None


def test_what_a_failed_pass_has_left_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The culprit's rows come last, so the pass fails when the other's losses and head gradients are there already."""
    known_loss(monkeypatch, "raising", Loss(raising))
    decoder = tiny_decoder("float32")
    alone, fused = new_adapter(decoder), new_adapter(decoder)
    operation = cross_entropy("mine", data_of())
    expected = run_one(Trainer(decoder, 48), operation, alone)
    bad = RunLoss("bad", tuple(without_weights(datum) for datum in data_of((5,))), "raising")
    trainer = Trainer(decoder, 48)
    for part in in_parts(operation, 48):
        result, error = run_all(trainer, [part, bad], {"mine": fused, "bad": new_adapter(decoder)})
        assert isinstance(error, EngineError)
    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def test_a_forgotten_operation_leaves_nothing_and_says_so() -> None:
    decoder = tiny_decoder("float32")
    adapter, trainer = new_adapter(decoder), Trainer(decoder, 48)
    first, second, *rest = in_parts(cross_entropy("a", data_of()), 48)
    other_first, *_, other_last = in_parts(cross_entropy("b", data_of((40, 40))), 48)
    run_all(trainer, [first, other_first], {"a": adapter, "b": new_adapter(decoder)})
    trainer.forget("a")
    late, done = run_all(trainer, [second, other_last], {"a": adapter, "b": new_adapter(decoder)})
    assert isinstance(late, EngineError)
    assert f"data[{second.numbers[0]}]" in str(late)
    assert isinstance(done, LossResult)
    assert run_all(trainer, rest, {"a": adapter}) == [late] * len(rest)
    run_one(trainer, cross_entropy("a", data_of()), adapter)


def test_frozen_weights_are_not_trained() -> None:
    decoder = tiny_decoder("float32")
    (error,) = run_all(Trainer(decoder, 48), [cross_entropy("a", data_of())], {"a": new_adapter(decoder).frozen_copy()})
    assert isinstance(error, InvalidInput)
