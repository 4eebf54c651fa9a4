"""The trainer against transformers, peft and torch.optim; and each operation against itself alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
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
from tests.models.tiny import TINY_KINDS, TinyKind, make_tiny_model
from tuft.engine.base import RunLoss
from tuft.engine.optim import optim_step
from tuft.engine.trainer import Trainer
from tuft.errors import EngineError, InvalidInput, NotFound, TuftError, UserError
from tuft.models.decoder import Decoder, Precision
from tuft.models.load import load_weights
from tuft.models.lora import Adapter
from tuft.types import AdamParams, AdapterState, Datum, LoraSpec, LossResult

TOLERANCE = 1e-4
ADAM = AdamParams(learning_rate=1e-3, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)
MIXED_LENGTHS = (3, 17, 1, 9, 2, 17, 30, 1)


def load_adapter(decoder: Decoder, state: AdapterState) -> Adapter:
    return Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=True)


def run_all(
    trainer: Trainer, operations: Sequence[RunLoss], adapters: dict[str, Adapter]
) -> list[LossResult | TuftError]:
    results = dict(trainer.run(operations, adapters))
    assert len(results) == len(operations)
    return [results[index] for index in range(len(operations))]


def run_one(trainer: Trainer, operation: RunLoss, adapter: Adapter) -> LossResult:
    (result,) = run_all(trainer, [operation], {operation.adapter_id: adapter})
    assert isinstance(result, LossResult), result
    return result


def cross_entropy(adapter_id: str, data: tuple[Datum, ...], backward: bool = True) -> RunLoss:
    return RunLoss(adapter_id, data, "cross_entropy", backward=backward)


def assert_trains_like_peft(decoder: Decoder, base: torch.nn.Module, spec: LoraSpec, lengths: Sequence[int]) -> None:
    """Loss, logprobs and every gradient of a first pass, then the weights after five steps of two passes each."""
    state = random_adapter_state(decoder.config, spec)
    adapter, trainer, reference = load_adapter(decoder, state), Trainer(decoder, 64), PeftReference(base, state)
    optimizer = reference.optimizer(ADAM)
    for step in range(5):
        for part in range(2):
            data = random_data(decoder.config.vocab_size, lengths, seed=2 * step + part)
            expected_loss, expected_logprobs = reference.forward_backward(data)
            result = run_one(trainer, cross_entropy("a", data), adapter)
            assert result.metrics["loss:sum"] == pytest.approx(expected_loss, rel=TOLERANCE, abs=1e-2)
            for actual, expected in zip(result.logprobs, expected_logprobs, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=1e-4)
        gradients = adapter.state(with_optimizer=True).gradients
        for name, expected in reference.gradients().items():
            if (
                step == 0
            ):  # Adam's first steps are signs of gradients: later ones differ where a gradient is almost zero
                assert relative_error(gradients[name], expected) < TOLERANCE, name
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters.values(), ADAM.grad_clip_norm)
        metrics = optim_step(adapter, ADAM).metrics
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["grad_norm:mean"] == pytest.approx(float(expected_norm), rel=TOLERANCE)
    weights = adapter.state(with_optimizer=False).weights
    for name, expected in reference.weights().items():
        assert relative_error(weights[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("train_unembed", [True, False])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_every_architecture_trains_as_under_transformers_and_peft(
    kind: TinyKind, train_unembed: bool, tmp_path: Path
) -> None:
    directory = make_tiny_model(kind, tmp_path)
    decoder = Decoder(load_weights(str(directory)), "float32", CPU)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_trains_like_peft(decoder, base, LoraSpec(rank=4, seed=1, train_unembed=train_unembed), (5, 9, 1, 33, 9, 40))


@pytest.mark.parametrize(("train_attn", "train_mlp"), [(True, False), (False, True)])
def test_only_the_chosen_linears_are_trained(train_attn: bool, train_mlp: bool, tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    decoder = Decoder(load_weights(str(directory)), "float32", CPU)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    spec = LoraSpec(rank=3, seed=1, train_attn=train_attn, train_mlp=train_mlp, train_unembed=False)
    assert_trains_like_peft(decoder, base, spec, (7, 12))


@pytest.mark.slow
@pytest.mark.parametrize("train_unembed", [True, False])
def test_the_embedded_model_trains_as_under_transformers_and_peft(train_unembed: bool) -> None:
    decoder = Decoder(smollm2_weights(), "float32", CPU)
    assert_trains_like_peft(
        decoder, smollm2_transformers(), LoraSpec(rank=8, seed=1, train_unembed=train_unembed), (6, 11)
    )


@cache
def tiny_decoder(precision: Precision) -> Decoder:
    """Odd sizes on purpose: no multiples of the vector width."""
    with tempfile.TemporaryDirectory() as directory:
        path = make_tiny_model(
            "qwen3", Path(directory), hidden_size=40, intermediate_size=100, head_dim=16, num_hidden_layers=3
        )
        return Decoder(load_weights(str(path)), precision, CPU)


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
@pytest.mark.parametrize("lengths", [MIXED_LENGTHS, (1,), (2, 3), (17,) * 5], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_fused_equals_alone_bit_for_bit(precision: Precision, lengths: tuple[int, ...], num_neighbours: int) -> None:
    decoder = tiny_decoder(precision)
    trainer = Trainer(decoder, 256)
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
    assert torch.equal(fused.gradients_P, alone.gradients_P)
