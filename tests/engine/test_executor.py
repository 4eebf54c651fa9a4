"""Which commands are computed together, and in which order: told by the order of the replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from tests.models.tiny import make_tiny_model
from tuft.engine.adapters import Adapters
from tuft.engine.base import (
    BaseModelSource,
    CancelSample,
    Command,
    CreateAdapter,
    DropAdapter,
    EngineSettings,
    ExportAdapter,
    LoadAdapter,
    OptimStep,
    RunLoss,
    Sample,
)
from tuft.engine.executor import Executor
from tuft.engine.loaded import LoadedModel, load_models
from tuft.engine.mailbox import Batch, Reply
from tuft.errors import EngineError, InvalidInput, UserError
from tuft.types import (
    AdamParams,
    AdapterState,
    Datum,
    DimuonParams,
    LoraSpec,
    LossResult,
    OptimStepResult,
    SampleResult,
    SampleSpec,
    SamplingParams,
)

MODEL, OTHER = "qwen", "llama"
PASS = 64
STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    directory = tmp_path_factory.mktemp("executor")
    other = make_tiny_model("llama", directory / "llama")
    sources = [
        BaseModelSource(name, str(path), str(directory / name / "tokenizer"), precision="float32")
        for name, path in ((MODEL, tiny_model), (OTHER, other))
    ]
    return load_models(sources, EngineSettings(num_threads=1))


class _Answered(BaseException):
    """All commands are answered: the executor may end."""


def replies(
    models: Sequence[LoadedModel], *batches: Sequence[Command], max_bytes: int | None = None
) -> list[tuple[int, object]]:
    """What an executor that finds ``batches`` in its mailbox says, in order; commands are numbered from 0."""
    inbox: SimpleQueue[Batch] = SimpleQueue()
    said: list[tuple[int, object]] = []
    num_commands = 0
    for batch in batches:
        inbox.put(Batch(tuple(enumerate(batch, num_commands))))
        num_commands += len(batch)

    def send(reply: Reply) -> None:
        said.append((reply.number, reply.result))
        if len(said) == num_commands:
            raise _Answered

    with pytest.raises(_Answered):
        Executor(Adapters(models, max_bytes), inbox, send, PASS).run()
    return said


def create(*adapter_ids: str, base_model: str = MODEL) -> list[Command]:
    return [CreateAdapter(name, base_model, LoraSpec(rank=2, seed=index)) for index, name in enumerate(adapter_ids)]


def loss(adapter_id: str, length: int = 20) -> RunLoss:
    tokens_T = np.arange(length) % 300 + 5
    return RunLoss(adapter_id, (Datum(tokens_T, {"target_tokens": tokens_T + 1}),), "cross_entropy")


def step(adapter_id: str) -> OptimStep:
    return OptimStep(adapter_id, STEP)


def order(said: list[tuple[int, object]], num_before: int) -> list[int]:
    """Numbers of the commands behind the first ``num_before``."""
    return [number - num_before for number, _ in said[num_before:]]


def test_losses_and_steps_of_batches_that_wait_together_are_computed_together(models: list[LoadedModel]) -> None:
    said = replies(
        models, create("a", "b", "c"), [loss("a"), step("a")], [loss("b"), step("b")], [loss("c"), step("c")]
    )
    assert order(said, 3) == [0, 2, 4, 1, 3, 5]
    assert all(isinstance(result, LossResult) for _, result in said[3:6])
    assert all(isinstance(result, OptimStepResult) for _, result in said[6:])


def test_fused_steps_equal_steps_alone(models: list[LoadedModel]) -> None:
    names = ("a", "b", "c")
    work = [[loss(name, 10 + index), step(name)] for index, name in enumerate(names)]
    together = replies(models, create(*names), *work, [ExportAdapter(name, True) for name in names])
    for index, name in enumerate(names):
        alone = replies(models, create(*names), work[index], [ExportAdapter(name, True)])
        fused, single = dict(together)[9 + index], dict(alone)[5]
        assert isinstance(fused, AdapterState)
        assert isinstance(single, AdapterState)
        assert fused.step == single.step == 1
        for key, weights in single.weights.items():
            np.testing.assert_array_equal(fused.weights[key], weights)


def test_losses_that_do_not_fit_one_pass_wait_for_the_next(models: list[LoadedModel]) -> None:
    said = replies(models, create("a", "b", "c"), [loss("a", 40)], [step("a")], [loss("b", 40)], [step("b"), loss("c")])
    assert order(said, 3) == [0, 4, 1, 2, 3]


def test_a_shared_beginning_counts_once(models: list[LoadedModel]) -> None:
    prompt = np.arange(40) + 5
    answers = [np.append(prompt, 100 + answer) for answer in range(10)]
    group = RunLoss("a", tuple(Datum(one, {"target_tokens": one}) for one in answers), "cross_entropy")
    said = replies(models, create("a", "b"), [group], [step("a")], [loss("b", 14)])
    assert order(said, 2) == [0, 2, 1]


def test_no_command_passes_another_of_its_adapter(models: list[LoadedModel]) -> None:
    waiting = [loss("a"), step("a"), loss("a"), step("a"), ExportAdapter("a", False), loss("a"), loss("b")]
    said = replies(models, create("a", "b"), waiting)
    assert order(said, 2) == [0, 6, 1, 2, 3, 4, 5]
    losses = [result.metrics["loss:sum"] for _, result in said if isinstance(result, LossResult)]
    assert losses[0] == losses[1]  # fresh adapters change nothing
    assert losses[3] < losses[2] < losses[0]


def test_what_goes_ahead_is_computed_before_what_waits_but_passes_none_of_its_adapter(
    models: list[LoadedModel],
) -> None:
    ahead = [replace(loss(name, 60), ahead=True) for name in "cb"]
    said = replies(models, create("a", "b", "c"), [loss("a", 60)], [loss("b", 60)], ahead)
    assert order(said, 3) == [2, 0, 1, 3]


def test_adapters_that_leave_the_device_between_turns_are_none_the_worse(models: list[LoadedModel]) -> None:
    """Room for none: each turn fetches the adapters it wants and lets go of all others; a sample keeps its own."""
    sample = Sample(MODEL, "a", SampleSpec((5, 6, 7), SamplingParams(max_tokens=30, stop=(), seed=1)))
    work = [[loss("a"), loss("b")], [step("a")], [loss("b"), step("b")], [sample], [loss("c")], [step("c"), loss("a")]]
    exports: list[Command] = [ExportAdapter(name, True) for name in ("a", "b", "c")]
    paged, kept = (
        dict(replies(models, create("a", "b", "c"), *work, exports, max_bytes=max_bytes)) for max_bytes in (1, None)
    )
    assert paged.keys() == kept.keys()
    for number, expected in kept.items():
        actual = paged[number]
        assert type(actual) is type(expected)
        if isinstance(expected, AdapterState):
            assert isinstance(actual, AdapterState)
            for name, array in expected.exp_avg.items():
                np.testing.assert_array_equal(actual.exp_avg[name], array)
        elif isinstance(expected, SampleResult):
            assert isinstance(actual, SampleResult)
            np.testing.assert_array_equal(actual.sequences[0].tokens_N, expected.sequences[0].tokens_N)
        else:
            assert str(actual) == str(expected)


def test_losses_of_two_base_models_are_answered_together(models: list[LoadedModel]) -> None:
    setup = [*create("a"), *create("b", base_model=OTHER)]
    said = replies(models, setup, [loss("a"), loss("b"), step("a"), step("b")])
    assert order(said, 2) == [0, 1, 2, 3]
    assert all(isinstance(result, LossResult | OptimStepResult) for _, result in said[2:])


def test_the_parts_of_an_operation_are_answered_by_its_last(models: list[LoadedModel]) -> None:
    data = tuple(datum for length in (30, 20, 25) for datum in loss("a", length).data)
    whole = RunLoss("a", data, "cross_entropy")
    parts = [
        RunLoss("a", data[:1], "cross_entropy", operation_id="op", is_last=False),
        RunLoss("a", data[1:], "cross_entropy", operation_id="op", first_datum=1),
    ]
    (_, expected), (_, state) = replies(models, create("a"), [whole, ExportAdapter("a", True)])[1:]
    (_, nothing), (_, result), (_, after) = replies(models, create("a"), [*parts, ExportAdapter("a", True)])[1:]
    assert nothing is None
    assert isinstance(expected, LossResult)
    assert isinstance(result, LossResult)
    assert result.metrics == pytest.approx(expected.metrics)
    assert isinstance(state, AdapterState)
    assert isinstance(after, AdapterState)
    for key, gradient in state.gradients.items():
        np.testing.assert_allclose(after.gradients[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reload", [False, True])
def test_an_adapter_that_is_replaced_takes_its_unfinished_operations_along(
    models: list[LoadedModel], reload: bool
) -> None:
    (state,) = [result for _, result in replies(models, create("a"), [ExportAdapter("a", False)])[1:]]
    assert isinstance(state, AdapterState)
    first = RunLoss("a", loss("a").data, "cross_entropy", operation_id="op", is_last=False)
    last = RunLoss("a", loss("a").data, "cross_entropy", operation_id="op", first_datum=1)
    again = [LoadAdapter("a", MODEL, state, True)] if reload else [DropAdapter("a"), *create("a")]
    said = replies(models, create("a"), [first, *again, last, ExportAdapter("a", True)])
    (_, error), (_, exported) = said[-2:]
    assert isinstance(error, EngineError)
    assert isinstance(exported, AdapterState)
    assert not any(gradient.any() for gradient in exported.gradients.values())


def test_a_step_that_fails_fails_alone(models: list[LoadedModel]) -> None:
    bad = OptimStep("b", AdamParams(learning_rate=float("nan")))
    said = dict(replies(models, create("a", "b"), [loss("a"), loss("b")], [step("a"), bad, step("nobody")]))
    assert isinstance(said[4], OptimStepResult)
    assert isinstance(said[5], InvalidInput)
    assert isinstance(said[6], EngineError)


def test_a_sample_steps_between_any_two_commands(models: list[LoadedModel]) -> None:
    sample = Sample(MODEL, None, SampleSpec((7, 8, 9), SamplingParams(max_tokens=4, stop=(), seed=1)))
    busy = [step("a"), loss("a", PASS), ExportAdapter("a", True), loss("a", PASS), step("a"), loss("a", PASS)]
    said = replies(models, create("a"), [sample], busy)
    assert [number for number, _ in said].index(1) <= 5


def test_a_sample_is_cancelled_where_it_is(models: list[LoadedModel]) -> None:
    """In the sampler, or still behind a command that makes its adapter; nobody else is."""
    spec = SampleSpec((5, 6, 7), SamplingParams(max_tokens=300, stop=(), seed=1))
    short = replace(spec, params=replace(spec.params, max_tokens=3))
    samples = [Sample(MODEL, None, spec, sample_id="joined"), Sample(MODEL, "a", spec, sample_id="behind")]
    cancels = [CancelSample("behind"), CancelSample("joined"), CancelSample("nobody")]
    said = replies(models, [*create("a"), *samples, Sample(MODEL, "a", short, sample_id="stays")], cancels)
    assert [number for number, _ in said[:5]] == [2, 4, 1, 5, 6]
    results = dict(said)
    assert isinstance(results[1], UserError)
    assert isinstance(results[2], UserError)
    assert [results[number] for number in (0, 4, 5, 6)] == [None] * 4
    assert isinstance(results[3], SampleResult)


def test_a_sample_steps_between_steps_of_dimuon(models: list[LoadedModel]) -> None:
    """Steps of AdamW would all be computed in one call."""
    names = "abcdefgh"
    created: list[Command] = [CreateAdapter(name, MODEL, LoraSpec(rank=2), "dimuon") for name in names]
    first, *others = (OptimStep(name, DimuonParams(0.1)) for name in names)
    sample = Sample(MODEL, "a", SampleSpec((7, 8, 9), SamplingParams(max_tokens=4, stop=(), seed=1)))
    said = replies(models, created, [first, sample, *others])
    assert all(isinstance(result, SampleResult | OptimStepResult) for _, result in said[8:])
    assert 0 < order(said, 8).index(1) < 8
