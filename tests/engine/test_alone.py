"""A run's numbers are those of a run that is alone: to the bit, whoever else is in the engine, in whatever order things
arrive, and also in another engine process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY_MODEL
from tests.engine.crowd import Record, Shape, differences, life, live, started
from tuft.embedded import EMBEDDED_NAME, find_embedded
from tuft.engine.base import BaseModelSource, EngineSettings
from tuft.engine.worker import EngineProcess

PASS_TOKENS = 256
SETTINGS = EngineSettings(device="cpu", micro_batch_tokens=PASS_TOKENS, kv_cache_tokens=8192)
NUM_CO_TENANTS = (0, 1, 3, 7)


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModelSource:
    tokenizer_dir = str(tmp_path_factory.mktemp("tokenizer") / "tiny")
    return BaseModelSource(TINY_MODEL, str(tiny_model), tokenizer_dir, precision="float32")


@pytest.fixture(scope="module")
def engine(source: BaseModelSource) -> Iterator[EngineProcess]:
    process = started(source, SETTINGS)
    yield process
    process.close()


def shape_of(engine: EngineProcess) -> Shape:
    (model,) = engine.base_models
    return Shape(model.name, model.vocab_size, engine.pass_tokens)


@pytest.fixture(scope="module")
def alone(engine: EngineProcess) -> dict[int, Record]:
    """What each of some runs says that has the engine to itself."""
    shape = shape_of(engine)
    return {number: live(engine, [life(shape, number)])[f"run-{number}"] for number in range(8)}


@pytest.mark.parametrize("num_co_tenants", NUM_CO_TENANTS)
@pytest.mark.parametrize("seed", range(3))
def test_no_bit_of_a_run_depends_on_its_co_tenants(
    engine: EngineProcess, alone: dict[int, Record], num_co_tenants: int, seed: int
) -> None:
    shape = shape_of(engine)
    numbers = [(seed + offset) % 8 for offset in range(num_co_tenants + 1)]
    together = live(engine, [life(shape, number) for number in numbers], seed)
    for number in numbers:
        assert differences(together[f"run-{number}"], alone[number]) == []


def test_another_engine_process_computes_the_same_bits(source: BaseModelSource, alone: dict[int, Record]) -> None:
    other = started(source, SETTINGS)
    try:
        shape = shape_of(other)
        numbers = range(4)
        together = live(other, [life(shape, number) for number in numbers], seed=9)
        for number in numbers:
            assert differences(together[f"run-{number}"], alone[number]) == []
    finally:
        other.close()


@pytest.mark.slow
def test_no_bit_of_a_run_of_the_embedded_model_depends_on_its_co_tenants(
    tmp_path: Path,
) -> None:
    source = BaseModelSource(EMBEDDED_NAME, str(find_embedded()), str(tmp_path / "tokenizer"))
    engine = started(source, SETTINGS)
    try:
        (model,) = engine.base_models
        shape = Shape(model.name, model.vocab_size, engine.pass_tokens, max_prompt=60, num_turns=3)
        first = live(engine, [life(shape, 1)])["run-1"]
        together = live(engine, [life(shape, number) for number in range(4)], seed=5)
        assert differences(together["run-1"], first) == []
    finally:
        engine.close()
