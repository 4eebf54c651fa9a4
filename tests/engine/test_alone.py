"""A run gets the same bits whoever else is there, in every life of the engine's process, and no one else's NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import KERNELS
from tests.engine.crowd import Life, Shape, differences, life, live, poisoned, started, state_after
from tests.engine.reference import smollm2_path
from tuft.engine.base import BaseModelSource, EngineSettings, ExportAdapter, LoadAdapter
from tuft.engine.worker import EngineProcess
from tuft.models.decoder import Precision
from tuft.models.kernels import build

PASS_TOKENS = 256
SAMPLES = 8192

Way = tuple[Precision, bool]
"""Precision, and whether kernels compute or torch's operators."""


@pytest.fixture(scope="module", params=[("bf16", True), ("float32", True), ("float32", False)], ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, way: Way) -> BaseModelSource:
    return BaseModelSource("tiny", str(tiny_model), str(tmp_path_factory.mktemp("tokenizer")), precision=way[0])


@pytest.fixture(scope="module")
def settings(way: Way) -> EngineSettings:
    return settings_of(with_kernels=way[1])


@pytest.fixture(scope="module")
def engine(source: BaseModelSource, settings: EngineSettings) -> Iterator[EngineProcess]:
    running = started(source, settings)
    yield running
    running.close()


def settings_of(with_kernels: bool) -> EngineSettings:
    if with_kernels:
        build.load(KERNELS)  # so that the engine finds them
    cache = str(KERNELS) if with_kernels else None
    return EngineSettings(
        num_threads=2, micro_batch_tokens=PASS_TOKENS, kv_cache_tokens=SAMPLES, kernel_cache=cache, deterministic=True
    )


def shape_of(engine: EngineProcess, num_turns: int = 10) -> Shape:
    (model,) = engine.base_models
    return Shape(model.name, model.vocab_size, engine.pass_tokens, num_turns=num_turns)


@pytest.mark.slow
@pytest.mark.parametrize("num_others", [0, 1, 3, 7])
def test_a_run_has_the_same_bits_beside_any_others(engine: EngineProcess, num_others: int) -> None:
    """Losses, logprobs, gradients, weights, moments, samples: of lives in random order at random times."""
    shape = shape_of(engine)
    for number in (5, 7 + num_others):
        mine = life(shape, number)
        alone = live(engine, [mine], seed=1)[mine.adapter_id]
        others = [life(shape, 100 * number + 10 + other) for other in range(num_others)]
        assert differences(live(engine, [mine, *others], seed=2)[mine.adapter_id], alone) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_what_others_cannot_compute_stays_with_them(engine: EngineProcess, seed: int) -> None:
    """Bad tokens, numbers that are none, learning rates beyond all reason: the run beside them notices nothing, nor
    does a run that comes after them and gets their memory."""
    shape = shape_of(engine)
    mine, later = life(shape, 20 + seed), life(shape, 30 + seed)
    alone = live(engine, [mine, later])
    others = [poisoned(shape, 10 * seed + number) for number in range(3)]

    records = live(engine, [mine, *others], seed=seed)

    assert differences(records[mine.adapter_id], alone[mine.adapter_id]) == []
    for other in others:
        errors = [line for line in records[other.adapter_id] if " got " in line or "finite" in line]
        assert len(errors) > 3, records[other.adapter_id]
    assert differences(live(engine, [later])[later.adapter_id], alone[later.adapter_id]) == []


@pytest.mark.slow
def test_another_life_of_the_process_goes_on_with_the_same_bits(
    engine: EngineProcess, source: BaseModelSource, settings: EngineSettings
) -> None:
    """From a run's state, as a server does when the process has died, and beside others."""
    shape = shape_of(engine)
    whole = [life(shape, number) for number in (1, 5)]
    expected = live(engine, whole)
    another = started(source, settings)
    try:
        rest = [rest_of(engine, one, shape.base_model) for one in whole]
        records = live(another, [*rest, life(shape, 77)])
    finally:
        another.close()
    for one in rest:
        record = records[one.adapter_id]
        assert differences(record[1:], expected[one.adapter_id][-len(record) + 1 :]) == []


def rest_of(engine: EngineProcess, one: Life, base_model: str) -> Life:
    """What follows the state in the middle of a life: no operation is half done there."""
    between = [number for number, turn in enumerate(one.turns) if isinstance(turn[0], ExportAdapter)][:-1]
    middle = between[len(between) // 2] + 1  # of two or more
    state = state_after(engine, one, middle)
    return Life(
        one.adapter_id, ((LoadAdapter(one.adapter_id, base_model, state, trainable=True),), *one.turns[middle:])
    )


@pytest.mark.slow
def test_the_embedded_model_has_the_same_bits_beside_others_and_in_another_life(tmp_path: Path) -> None:
    source = BaseModelSource("smollm", str(smollm2_path()), str(tmp_path), precision="bf16")
    settings = settings_of(with_kernels=True)
    first = started(source, settings)
    try:
        shape = shape_of(first, num_turns=5)
        mine = life(shape, 7)
        alone = live(first, [mine])[mine.adapter_id]
    finally:
        first.close()
    second = started(source, settings)
    try:
        others = [life(shape, number) for number in (41, 42)]
        record = live(second, [mine, *others], pause_s=0.1)[mine.adapter_id]
    finally:
        second.close()
    assert differences(record, alone) == []
