"""The trainer against transformers, peft and torch.optim; and each operation against itself alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.reference import (
    CPU,
    PeftReference,
    random_adapter_state,
    random_data,
    relative_error,
    smollm2_transformers,
    smollm2_weights,
)
from tests.models.operators import EAGER, every_ops
from tests.models.tiny import TINY_KINDS, VOCAB_SIZE, TinyKind, make_tiny_model
from tuft.engine.base import RunLoss
from tuft.engine.losses import LOSSES, Loss, LossRecord, LossTerms
from tuft.engine.optim import optim_steps
from tuft.engine.trainer import Trainer
from tuft.errors import EngineError, TuftError, UserError
from tuft.losses import LOSS_SIGNATURES, LossSignature
from tuft.models.decoder import Decoder, Precision
from tuft.models.load import load_weights
from tuft.models.lora import Adapter
from tuft.models.ops import Ops
from tuft.prefixes import cut
from tuft.types import AdamParams, AdapterState, Datum, LoraSpec, LossResult, OptimStepResult

TOLERANCE = 1e-4
# eps so large that it does not come down to the sign of a gradient that is almost zero
ADAM = AdamParams(learning_rate=1e-3, eps=1e-5, weight_decay=0.1, grad_clip_norm=1.0)
# "The sky is blue because air scatters short waves of light more than long ones. At sunset the light comes a longer
# way through the air, and what is left of it is red.", as SmolLM2's tokens
TEXT = [
    *(504, 6376, 314, 4461, 975, 1512, 806, 42154, 1890, 6147, 282, 1420, 540, 670, 986, 2911, 30, 1814, 21822),
    *(260, 1420, 2216, 253, 2848, 970, 738, 260, 1512, 28, 284, 732, 314, 2049, 282, 357, 314, 2382, 30),
]
MIXED_LENGTHS = (3, 17, 1, 9, 2, 17, 30, 1)


def load_adapter(decoder: Decoder, state: AdapterState) -> Adapter:
    return Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=True)


def run_all(
    trainer: Trainer, parts: Sequence[RunLoss], adapters: dict[str, Adapter]
) -> list[LossResult | TuftError | None]:
    """All in one pass."""
    results = dict(trainer.run(parts, adapters))
    assert len(results) == len(parts)
    return [results[index] for index in range(len(parts))]


def in_parts(operation: RunLoss, max_rows: int, operation_id: str = "operation") -> list[RunLoss]:
    cuts = cut([datum.tokens_T for datum in operation.data], max_rows)
    return [
        replace(
            operation,
            data=tuple(operation.data[number] for number in piece.numbers),
            operation_id=operation_id,
            first_datum=piece.first,
            datum_numbers=piece.numbers,
            is_last=piece is cuts[-1],
        )
        for piece in cuts
    ]


def run_one(trainer: Trainer, operation: RunLoss, adapter: Adapter) -> LossResult:
    """Cut as the service does, a part a pass."""
    result: object = None
    for part in in_parts(operation, trainer.micro_batch_tokens):
        assert result is None
        (result,) = run_all(trainer, [part], {operation.adapter_id: adapter})
    assert isinstance(result, LossResult), result
    return result


def gradients_of(adapter: Adapter) -> torch.Tensor:
    assert adapter.gradients_P is not None
    return adapter.gradients_P


def cross_entropy(adapter_id: str, data: tuple[Datum, ...], backward: bool = True) -> RunLoss:
    return RunLoss(adapter_id, data, "cross_entropy", backward=backward)


def assert_trains_like_peft(
    decoder: Decoder,
    base: torch.nn.Module,
    state: AdapterState,
    data_of_pass: Callable[[int], tuple[Datum, ...]],
    adam: AdamParams = ADAM,
) -> None:
    """Losses, logprobs, every gradient of the first step, and the weights after five steps of two passes each."""
    adapter, trainer, reference = load_adapter(decoder, state), Trainer(decoder, 64), PeftReference(base, state)
    optimizer = reference.optimizer(adam)
    for step in range(5):
        for part in range(2):
            data = data_of_pass(2 * step + part)
            expected_loss, expected_logprobs = reference.forward_backward(data)
            result = run_one(trainer, cross_entropy("a", data), adapter)
            assert result.metrics["loss:sum"] == pytest.approx(expected_loss, rel=TOLERANCE, abs=1e-2)
            for actual, expected in zip(result.logprobs, expected_logprobs, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=1e-4)
        if step == 0:  # Adam's first steps are signs of gradients: later ones differ where a gradient is almost zero
            gradients = adapter.state(with_optimizer=True).gradients
            for name, expected in reference.gradients().items():
                assert relative_error(gradients[name], expected) < TOLERANCE, name
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters.values(), adam.grad_clip_norm)
        (stepped,) = optim_steps([(adapter, adam)])
        assert isinstance(stepped, OptimStepResult)
        metrics = stepped.metrics
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["grad_norm:mean"] == pytest.approx(float(expected_norm), rel=TOLERANCE if step == 0 else 1e-2)
    weights = adapter.state(with_optimizer=False).weights
    for name, expected in reference.weights().items():
        assert relative_error(weights[name], expected) < TOLERANCE, name


def random_tiny_data(seed: int) -> tuple[Datum, ...]:
    return random_data(VOCAB_SIZE, (5, 9, 1, 33, 9, 40), seed)


@every_ops
@pytest.mark.parametrize("train_unembed", [True, False])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_every_architecture_trains_as_under_transformers_and_peft(
    kind: TinyKind, train_unembed: bool, ops: Ops, tmp_path: Path
) -> None:
    directory = make_tiny_model(kind, tmp_path)
    decoder = Decoder(load_weights(str(directory)), "float32", CPU, ops)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = random_adapter_state(decoder.config, LoraSpec(rank=8, seed=1, train_unembed=train_unembed))
    assert_trains_like_peft(decoder, base, state, random_tiny_data)


@pytest.mark.parametrize(("train_attn", "train_mlp"), [(True, False), (False, True)])
def test_only_the_chosen_linears_are_trained(train_attn: bool, train_mlp: bool, tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    decoder = Decoder(load_weights(str(directory)), "float32", CPU)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    spec = LoraSpec(rank=3, seed=1, train_attn=train_attn, train_mlp=train_mlp, train_unembed=False)
    assert_trains_like_peft(decoder, base, random_adapter_state(decoder.config, spec), random_tiny_data)


@pytest.mark.slow
@every_ops
def test_the_embedded_model_trains_as_under_transformers_and_peft(ops: Ops) -> None:
    decoder = Decoder(smollm2_weights(), "float32", CPU, ops)
    spec = LoraSpec(rank=8, seed=1)
    state = random_adapter_state(decoder.config, spec, size=0.02)
    assert_trains_like_peft(decoder, smollm2_transformers(), state, text_data, replace(ADAM, learning_rate=1e-4))


def text_data(seed: int) -> tuple[Datum, ...]:
    """Text, in sequences of 12 tokens and more: on random tokens, and with the kernels that peft's own products take
    for fewer rows, float32's rounding alone is 1e-4 of a gradient (ours is the nearer to float64 there)."""
    rng = np.random.default_rng(seed)
    return tuple(
        Datum(
            np.array(TEXT[start:stop]),
            {
                "target_tokens": np.array(TEXT[start + 1 : stop + 1]),
                "weights": rng.normal(1, 1, stop - start).astype(np.float32),
            },
        )
        for start, stop in ((0, 14), (14, 37))
    )


@cache
def tiny_decoder(precision: Precision, ops: Ops = EAGER) -> Decoder:
    """Odd sizes on purpose: no multiples of the vector width."""
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny_model(
            "qwen3", Path(directory), hidden_size=40, intermediate_size=200, head_dim=16, num_hidden_layers=3
        )
        return Decoder(load_weights(str(path)), precision, CPU, ops)


def neighbour(decoder: Decoder, number: int) -> tuple[RunLoss, AdapterState]:
    """Another tenant's operation: its own rank, trained linears, lengths, and every third only a forward."""
    rng = np.random.default_rng(100 + number)
    spec = LoraSpec(
        rank=int(rng.integers(1, 17)), seed=number, train_attn=number % 2 == 0, train_unembed=number % 4 != 3
    )
    lengths = [int(length) for length in rng.integers(1, 40, size=rng.integers(1, 7))]
    data = random_data(decoder.config.vocab_size, [*lengths, 17], seed=number)
    state = random_adapter_state(decoder.config, spec, seed=number)
    return cross_entropy(f"neighbour-{number}", data, backward=number % 3 != 2), state


@pytest.mark.parametrize("num_neighbours", [1, 3, 7])
@pytest.mark.parametrize("lengths", [MIXED_LENGTHS, (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@every_ops
def test_fused_equals_alone_bit_for_bit(
    ops: Ops, precision: Precision, lengths: tuple[int, ...], num_neighbours: int
) -> None:
    assert_fused_equals_alone(tiny_decoder(precision, ops), lengths, num_neighbours)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@every_ops
def test_fused_equals_alone_bit_for_bit_with_the_embedded_model(ops: Ops, precision: Precision) -> None:
    assert_fused_equals_alone(Decoder(smollm2_weights(), precision, CPU, ops), (100, 3, 64, 1, 17), num_neighbours=4)


def assert_fused_equals_alone(decoder: Decoder, lengths: tuple[int, ...], num_neighbours: int) -> None:
    """An operation's result and gradients do not change by one bit when others share its passes."""
    trainer = Trainer(decoder, 512)
    mine = cross_entropy("mine", random_data(decoder.config.vocab_size, lengths))
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    alone = load_adapter(decoder, state)
    expected = run_one(trainer, mine, alone)

    others = [neighbour(decoder, number) for number in range(num_neighbours)]
    fused = load_adapter(decoder, state)
    adapters = {operation.adapter_id: load_adapter(decoder, other) for operation, other in others} | {"mine": fused}
    operations = [operation for operation, _ in others]
    operations.insert(num_neighbours // 2, mine)
    result = run_all(trainer, operations, adapters)[num_neighbours // 2]

    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert all(np.array_equal(a, b) for a, b in zip(result.logprobs, expected.logprobs, strict=True))
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def test_a_diverged_neighbour_fails_alone_and_by_name() -> None:
    decoder = tiny_decoder("float32")
    trainer = Trainer(decoder, 512)
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    mine = cross_entropy("mine", random_data(decoder.config.vocab_size, MIXED_LENGTHS))
    bad = cross_entropy("bad", random_data(decoder.config.vocab_size, (4, 17), seed=9))
    alone, fused, diverged = (load_adapter(decoder, state) for _ in range(3))
    diverged.params_P.mul_(1e20)
    expected = run_one(trainer, mine, alone)

    error, result = run_all(trainer, [bad, mine], {"mine": fused, "bad": diverged})

    assert isinstance(error, UserError)
    assert "data[0].logprobs" in str(error)
    assert diverged.gradients_P is None
    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert torch.equal(gradients_of(fused), gradients_of(alone))


@pytest.mark.parametrize(
    ("weight", "field"), [(3e38, "data[1].loss_fn_inputs"), (4e37, "data: the gradients are not finite")]
)
def test_weights_that_overflow_are_the_operations_own_error(weight: float, field: str) -> None:
    decoder = tiny_decoder("float32")
    adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))
    fine, datum = random_data(decoder.config.vocab_size, (3, 9))
    huge = replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "weights": np.full(9, weight, np.float32)})

    (error,) = run_all(Trainer(decoder, 512), [cross_entropy("a", (fine, huge))], {"a": adapter})

    assert isinstance(error, UserError)
    assert field in str(error)
    assert adapter.gradients_P is None


def test_bad_data_is_refused_before_it_is_computed_with_others() -> None:
    decoder = tiny_decoder("float32")
    adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))
    good, other = random_data(decoder.config.vocab_size, (3, 9))
    bad = replace(other, tokens_T=np.where(np.arange(9) == 4, decoder.config.vocab_size, other.tokens_T))
    operations = [cross_entropy("a", (good, bad)), cross_entropy("a", (good,)), cross_entropy("nobody", (good,))]

    first, second, third = run_all(Trainer(decoder, 512), operations, {"a": adapter})

    assert str(first) == f"data[1].model_input[4]: got {decoder.config.vocab_size}; token ids of the model are 0 to 383"
    assert isinstance(second, LossResult)
    assert "nobody" in str(third)


def known_loss(monkeypatch: pytest.MonkeyPatch, name: str, loss: Loss) -> None:
    monkeypatch.setitem(LOSSES, name, loss)  # type: ignore[arg-type]
    monkeypatch.setitem(LOSS_SIGNATURES, name, LossSignature())  # type: ignore[arg-type]


def raising(record: LossRecord) -> LossTerms:
    raise RuntimeError("as a defect would")


def test_what_a_shared_pass_raises_is_blamed_on_the_culprit_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    known_loss(monkeypatch, "raising", Loss(raising))
    decoder = tiny_decoder("float32")
    trainer = Trainer(decoder, 512)
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    mine = cross_entropy("mine", random_data(decoder.config.vocab_size, MIXED_LENGTHS))
    culprit = RunLoss("culprit", random_data(decoder.config.vocab_size, (5,)), "raising")
    culprit = replace(culprit, data=tuple(without_weights(datum) for datum in culprit.data))
    alone, fused = load_adapter(decoder, state), load_adapter(decoder, state)
    expected = run_one(trainer, mine, alone)

    error, result = run_all(trainer, [culprit, mine], {"mine": fused, "culprit": load_adapter(decoder, state)})

    assert isinstance(error, EngineError)
    assert "as a defect would" in str(error)
    assert "Traceback" in capfd.readouterr().err
    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def without_weights(datum: Datum) -> Datum:
    return replace(datum, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]})


def test_operations_of_one_adapter_accumulate_in_their_order() -> None:
    decoder = tiny_decoder("float32")
    trainer = Trainer(decoder, 64)
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    operations = [
        cross_entropy("a", random_data(decoder.config.vocab_size, lengths, seed=number))
        for number, lengths in enumerate([(40, 40, 3), (5,), (30,)])
    ]
    together, one_by_one = load_adapter(decoder, state), load_adapter(decoder, state)
    parts = [part for number, whole in enumerate(operations) for part in in_parts(whole, 64, f"operation-{number}")]
    run_all(trainer, parts, {"a": together})
    for operation in operations:
        run_one(trainer, operation, one_by_one)
    assert torch.equal(gradients_of(together), gradients_of(one_by_one))


def test_a_forward_changes_nothing_and_reports_the_same_logprobs() -> None:
    decoder = tiny_decoder("float32")
    trainer = Trainer(decoder, 512)
    adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))
    data = random_data(decoder.config.vocab_size, MIXED_LENGTHS)
    forward = run_one(trainer, cross_entropy("a", data, backward=False), adapter)
    assert adapter.gradients_P is None
    backward = run_one(trainer, cross_entropy("a", data), adapter)
    assert gradients_of(adapter).any()
    assert forward.metrics == backward.metrics
    assert all(np.array_equal(a, b) for a, b in zip(forward.logprobs, backward.logprobs, strict=True))


def test_forwards_and_backwards_are_a_pass_each() -> None:
    decoder = tiny_decoder("float32")
    state = random_adapter_state(decoder.config, LoraSpec(rank=2, seed=1))
    adapters = {name: load_adapter(decoder, state) for name in "ab"}
    data = random_data(decoder.config.vocab_size, (10,))
    parts = [cross_entropy(name, data, backward) for name, backward in (("a", True), ("b", False), ("b", True))]
    events: list[object] = []
    for index, _ in Trainer(decoder, 64).run(parts, adapters, between=lambda: events.append("between")):
        events.append(index)
    assert events == [1, "between", 0, 2]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_pass_beyond_the_budget_has_the_bits_of_one_that_keeps_its_activations(precision: Precision) -> None:
    decoder = tiny_decoder(precision)
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    operation = cross_entropy("a", random_data(decoder.config.vocab_size, (500,)))
    kept, computed_again = load_adapter(decoder, state), load_adapter(decoder, state)
    expected = run_one(Trainer(decoder, 512), operation, kept)
    result = run_one(Trainer(decoder, 64), operation, computed_again)
    assert result.metrics == expected.metrics
    assert np.array_equal(result.logprobs[0], expected.logprobs[0])
    assert torch.equal(gradients_of(computed_again), gradients_of(kept))


def test_soft_targets_are_summed_over_their_alternatives() -> None:
    decoder = tiny_decoder("float32")
    trainer = Trainer(decoder, 512)
    state = random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1))
    (datum,) = random_data(decoder.config.vocab_size, (11,))
    targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
    other = (targets + 7) % decoder.config.vocab_size
    soft = Datum(
        datum.tokens_T,
        {"target_tokens": np.stack([targets, other], axis=1), "weights": np.stack([weights, -0.5 * weights], axis=1)},
    )
    together, apart = load_adapter(decoder, state), load_adapter(decoder, state)
    result = run_one(trainer, cross_entropy("a", (soft,)), together)
    hard = run_one(trainer, cross_entropy("a", (datum,)), apart)
    second = Datum(datum.tokens_T, {"target_tokens": other, "weights": -0.5 * weights})
    hard_second = run_one(trainer, cross_entropy("a", (second,)), apart)

    assert result.logprobs[0].shape == (11, 2)
    np.testing.assert_allclose(result.logprobs[0][:, 0], hard.logprobs[0], rtol=1e-6)
    expected_loss = hard.metrics["loss:sum"] + hard_second.metrics["loss:sum"]
    assert result.metrics["loss:sum"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(gradients_of(together).numpy(), gradients_of(apart).numpy()) < 1e-5


def with_metrics(record: LossRecord) -> LossTerms:
    p_M = record.logprobs_M
    return LossTerms(
        -p_M, lambda: {"p:mean": p_M, "p:min": p_M, "p:max": p_M, "two:sum": torch.tensor([2.0]), "of:mean": p_M[:0]}
    )


def test_a_losss_own_metrics_are_reduced_as_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    known_loss(monkeypatch, "with_metrics", Loss(with_metrics))
    decoder = tiny_decoder("float32")
    adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=5, seed=1)))
    data = tuple(without_weights(datum) for datum in random_data(decoder.config.vocab_size, (30, 3, 30)))
    result = run_one(Trainer(decoder, 32), RunLoss("a", data, "with_metrics"), adapter)
    p = np.concatenate(result.logprobs)
    expected = {"loss:sum": -p.sum(), "p:mean": p.mean(), "p:min": p.min(), "p:max": p.max(), "two:sum": 3 * 2.0}
    assert result.metrics == pytest.approx(expected)  # three parts; the mean of nothing is left out


def test_bf16_stays_within_its_bound_of_float32() -> None:
    """The bound of any bf16 trainer, not a target: 0.1 nats a token, 10 % of the gradient's norm."""
    results, gradients = [], []
    for precision in ("float32", "bf16"):
        decoder = tiny_decoder(precision)
        adapter = load_adapter(decoder, random_adapter_state(decoder.config, LoraSpec(rank=8, seed=1)))
        data = random_data(decoder.config.vocab_size, (*MIXED_LENGTHS, 100, 100))
        results.append(np.concatenate(run_one(Trainer(decoder, 512), cross_entropy("a", data), adapter).logprobs))
        gradients.append(gradients_of(adapter).numpy())
    assert np.abs(results[1] - results[0]).max() < 0.1
    assert relative_error(gradients[1], gradients[0]) < 0.1
    assert not np.array_equal(results[1], results[0])
