"""The engine as a real process with a real, tiny model: replies, errors, death and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tuft.engine.base import (
    BaseModelSource,
    CopyAdapter,
    CreateAdapter,
    DropAdapter,
    EngineSettings,
    ExportAdapter,
    LoadAdapter,
    OptimStep,
    RunLoss,
    Sample,
)
from tuft.engine.worker import EngineProcess
from tuft.errors import EngineDied, EngineError, InvalidInput, ModelError
from tuft.types import AdamParams, AdapterState, Datum, LoraSpec, LossResult, SampleResult, SampleSpec, SamplingParams

TIMEOUT_S = 60.0
MODEL = "tiny"
SPEC = LoraSpec(rank=4, seed=3)
ENDLESS = SamplingParams(max_tokens=400, stop=(), seed=1)


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModelSource:
    tokenizer_dir = tmp_path_factory.mktemp("engine") / "tokenizer"
    return BaseModelSource(MODEL, str(tiny_model), str(tokenizer_dir), aliases=("small",), precision="float32")


@pytest.fixture(scope="module")
def engine(source: BaseModelSource) -> Iterator[EngineProcess]:
    """One process for all tests that leave it alive."""
    engine = start_engine(source)
    yield engine
    engine.close()


@pytest.fixture
def own_engine(source: BaseModelSource) -> Iterator[EngineProcess]:
    engine = start_engine(source)
    yield engine
    engine.close()


def start_engine(source: BaseModelSource) -> EngineProcess:
    engine = EngineProcess([source], EngineSettings(num_threads=1))
    engine.start()
    engine.wait_ready(TIMEOUT_S)
    return engine


def ask(engine: EngineProcess, *batch: object) -> list[object]:
    return [future.result(TIMEOUT_S) for future in engine.submit(batch)]  # type: ignore[arg-type]


def loss_of(adapter_id: str, length: int = 20, target: int | None = None) -> RunLoss:
    tokens_T = np.arange(length) % 300 + 5
    targets_T = tokens_T + 1
    if target is not None:
        targets_T[3] = target
    return RunLoss(adapter_id, (Datum(tokens_T, {"target_tokens": targets_T}),), "cross_entropy")


def sample_of(adapter_id: str | None, params: SamplingParams = ENDLESS, base_model: str = MODEL) -> Sample:
    return Sample(base_model, adapter_id, SampleSpec((7, 8, 9), params))


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_ready_engine_tells_of_its_base_models(engine: EngineProcess, source: BaseModelSource) -> None:
    (info,) = engine.base_models
    assert (info.name, info.aliases, info.precision) == (MODEL, ("small",), "float32")
    assert (Path(source.tokenizer_dir) / "tokenizer.json").is_file()
    assert info.linear_shapes["lm_head"][0] == info.vocab_size
    assert engine.error is None


def test_the_life_of_an_adapter(engine: EngineProcess) -> None:
    ask(engine, CreateAdapter("run", MODEL, SPEC))
    losses = []
    for _ in range(8):
        result, _ = ask(engine, loss_of("run"), OptimStep("run", AdamParams(learning_rate=1e-2)))
        assert isinstance(result, LossResult)
        losses.append(result.metrics["loss:sum"])
    assert losses[-1] < 0.8 * losses[0]

    (state,) = ask(engine, ExportAdapter("run", with_optimizer=True))
    assert isinstance(state, AdapterState)
    assert state.step == 8
    ask(engine, LoadAdapter("again", MODEL, state, trainable=True))
    (after,), (expected,) = ask(engine, loss_of("again")), ask(engine, loss_of("run"))
    assert isinstance(after, LossResult)
    assert isinstance(expected, LossResult)
    np.testing.assert_array_equal(after.logprobs[0], expected.logprobs[0])

    ask(engine, DropAdapter("run"), DropAdapter("run"))
    with pytest.raises(EngineError, match="adapter 'run' is not loaded"):
        ask(engine, ExportAdapter("run", with_optimizer=False))


def test_commands_of_one_adapter_keep_their_order_within_a_batch(engine: EngineProcess) -> None:
    batch = [
        CreateAdapter("left", MODEL, SPEC),
        CreateAdapter("right", MODEL, SPEC),
        loss_of("left"),
        loss_of("right"),
        OptimStep("left", AdamParams(learning_rate=1e-2)),
        loss_of("left"),
        loss_of("right"),
        CopyAdapter("left", "frozen"),
        sample_of("frozen", SamplingParams(max_tokens=3)),
    ]
    _, _, left, right, _, left_again, right_again, copied, sampled = ask(engine, *batch)
    assert isinstance(left, LossResult)
    assert isinstance(right, LossResult)
    assert isinstance(left_again, LossResult)
    assert isinstance(right_again, LossResult)
    assert left.metrics == right.metrics == right_again.metrics
    assert left_again.metrics["loss:sum"] < left.metrics["loss:sum"]
    assert copied is None
    assert isinstance(sampled, SampleResult)


def test_a_sample_sees_the_adapter_as_of_its_place_in_the_mailbox(engine: EngineProcess) -> None:
    step = [loss_of("moving"), OptimStep("moving", AdamParams(learning_rate=0.1))]
    first, second = sample_of("before"), sample_of("after")
    futures = [
        future
        for batch in (
            [CreateAdapter("moving", MODEL, SPEC), CopyAdapter("moving", "before")],
            [first],
            [sample_of("moving")],
            step,
            [CopyAdapter("moving", "after")],
            [second],
            [sample_of("moving")],
            [DropAdapter("before"), DropAdapter("after"), DropAdapter("moving")],
        )
        for future in engine.submit(batch)
    ]
    results = [result for future in futures if isinstance(result := future.result(TIMEOUT_S), SampleResult)]
    before, moving_before, after, moving_after = [result.sequences[0].tokens_N.tolist() for result in results]
    assert before == moving_before
    assert after == moving_after
    assert before != after


def test_base_models_are_known_by_their_aliases_too(engine: EngineProcess) -> None:
    by_name, by_alias = ask(engine, sample_of(None), sample_of(None, base_model="small"))
    assert isinstance(by_name, SampleResult)
    assert isinstance(by_alias, SampleResult)
    np.testing.assert_array_equal(by_name.sequences[0].tokens_N, by_alias.sequences[0].tokens_N)


def test_many_samples_and_losses_at_once_are_all_answered(engine: EngineProcess) -> None:
    ask(engine, *(CreateAdapter(f"many{n}", MODEL, SPEC) for n in range(4)))
    futures = []
    for n in range(12):
        futures += engine.submit([loss_of(f"many{k}", length=200) for k in range(4)])
        futures += engine.submit([sample_of(f"many{n % 4}", SamplingParams(max_tokens=20))])
    assert len([future.result(TIMEOUT_S) for future in futures]) == 60


def test_a_batch_larger_than_the_pipe_does_not_block_who_submits_it(engine: EngineProcess) -> None:
    ask(engine, CreateAdapter("large", MODEL, SPEC))
    (busy,) = engine.submit([sample_of(None)])
    data = Datum(np.full(2_000_000, 7), {"target_tokens": np.full(2_000_000, 8)})  # 32 MB
    (future,) = engine.submit([RunLoss("large", (data,), "unknown")])
    assert not future.done()
    with pytest.raises(InvalidInput, match="loss_fn"):
        future.result(TIMEOUT_S)
    assert isinstance(busy.result(TIMEOUT_S), SampleResult)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind", "text"),
    [
        (loss_of("nobody"), EngineError, "adapter 'nobody' is not loaded"),
        (OptimStep("nobody", AdamParams()), EngineError, "'nobody'"),
        (CopyAdapter("nobody", "copy"), EngineError, "'nobody'"),
        (sample_of("nobody"), EngineError, "'nobody'"),
        (sample_of(None, base_model="large"), EngineError, "base model 'large' is not loaded; loaded are: tiny, small"),
        (CreateAdapter("new", "large", SPEC), EngineError, "base model 'large'"),
        (sample_of(None, SamplingParams(temperature=-1.0)), InvalidInput, "sampling_params.temperature: got -1.0"),
        (LoadAdapter("new", MODEL, AdapterState(SPEC, {}), True), InvalidInput, r"weights\["),
    ],
)
def test_an_error_arrives_as_its_class(engine: EngineProcess, command: object, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        ask(engine, command)


def test_an_error_arrives_with_its_fields_and_the_others_of_its_batch_succeed(engine: EngineProcess) -> None:
    ask(engine, CreateAdapter("good", MODEL, SPEC), CreateAdapter("bad", MODEL, SPEC))
    good, bad, also_good = engine.submit([loss_of("good"), loss_of("bad", target=100_000), loss_of("good")])
    with pytest.raises(InvalidInput) as caught:
        bad.result(TIMEOUT_S)
    assert caught.value.field == "data[0].loss_fn_inputs.target_tokens[3]"
    assert caught.value.value == 100_000
    for future in (good, also_good):
        assert isinstance(future.result(TIMEOUT_S), LossResult)


def test_frozen_weights_cannot_be_trained(engine: EngineProcess) -> None:
    ask(engine, CreateAdapter("source", MODEL, SPEC), CopyAdapter("source", "ice"))
    for command in (loss_of("ice"), OptimStep("ice", AdamParams())):
        with pytest.raises(InvalidInput, match="must be trainable"):
            ask(engine, command)


def test_an_unexpected_exception_is_an_engine_error_and_the_engine_goes_on(engine: EngineProcess) -> None:
    pid = engine.pid
    ask(engine, CreateAdapter("odd", MODEL, SPEC))
    with pytest.raises(EngineError, match=r"AttributeError|TypeError"):
        ask(engine, RunLoss("odd", ("not a datum",), "cross_entropy"))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"OptimStep: \w+Error"):
        ask(engine, OptimStep("odd", None))  # type: ignore[arg-type]
    assert isinstance(ask(engine, loss_of("odd"))[0], LossResult)
    assert engine.pid == pid


# --- death and end ----------------------------------------------------------------------------------------------------


def test_work_of_a_killed_process_fails_and_the_next_one_takes_new_work(own_engine: EngineProcess) -> None:
    ask(own_engine, CreateAdapter("run", MODEL, SPEC))
    pid = own_engine.pid
    assert pid is not None
    futures = own_engine.submit([sample_of("run"), sample_of(None)])
    os.kill(pid, signal.SIGKILL)
    for future in futures:
        with pytest.raises(EngineDied, match="ended by SIGKILL while it held this work"):
            future.result(TIMEOUT_S)
    assert own_engine.generation == 2
    with pytest.raises(EngineError, match="adapter 'run' is not loaded"):
        ask(own_engine, loss_of("run"))
    ask(own_engine, CreateAdapter("run", MODEL, SPEC))
    assert isinstance(ask(own_engine, loss_of("run"))[0], LossResult)
    assert own_engine.pid != pid
    assert own_engine.base_models


def test_close_leaves_no_process_and_fails_what_it_held(own_engine: EngineProcess) -> None:
    pid = own_engine.pid
    assert pid is not None
    (future,) = own_engine.submit([sample_of(None)])
    own_engine.close()
    assert not is_alive(pid)
    with pytest.raises(EngineDied, match="closed"):
        future.result(0)
    with pytest.raises(EngineDied, match="closed"):
        own_engine.submit([sample_of(None)])[0].result(0)
    assert own_engine.generation == 1
    own_engine.close()


def test_close_while_it_loads_leaves_no_process(source: BaseModelSource) -> None:
    engine = EngineProcess([source], EngineSettings())
    engine.start()
    wait_until(lambda: engine.pid is not None)
    pid = engine.pid
    assert pid is not None
    engine.close()
    assert not is_alive(pid)
    with pytest.raises(EngineError, match="closed"):
        engine.wait_ready(TIMEOUT_S)


def test_signals_to_the_group_are_the_parents_to_decide(own_engine: EngineProcess) -> None:
    pid = own_engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert isinstance(ask(own_engine, sample_of(None))[0], SampleResult)
    assert own_engine.pid == pid


def test_the_process_ends_with_its_parent(source: BaseModelSource) -> None:
    script = f"""
from tuft.engine.base import BaseModelSource, EngineSettings
from tuft.engine.worker import EngineProcess
engine = EngineProcess([{source!r}], EngineSettings())
engine.start()
engine.wait_ready(60)
print(engine.pid, flush=True)
import signal; signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(pid))


def test_a_base_model_that_cannot_be_loaded_keeps_the_engine_down(tmp_path: Path) -> None:
    engine = EngineProcess([BaseModelSource("no", str(tmp_path / "none.gguf"), str(tmp_path / "t"))], EngineSettings())
    engine.start()
    with pytest.raises(ModelError, match=r"none\.gguf"):
        engine.wait_ready(TIMEOUT_S)
    assert engine.base_models == ()
    assert isinstance(engine.error, ModelError)
    with pytest.raises(EngineDied, match=r"the engine is down: .*none\.gguf"):
        engine.submit([sample_of(None)])[0].result(0)
    engine.close()


def test_a_process_that_dies_at_every_start_stays_down(
    source: BaseModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")  # the interpreter itself fails
    engine = EngineProcess([source], EngineSettings())
    engine.start()
    with pytest.raises(EngineError, match=r"failed to start 4 times in a row; .*exit status 1"):
        engine.wait_ready(TIMEOUT_S)
    engine.close()


def test_the_parents_side_loads_no_torch() -> None:
    code = "import sys, tuft.engine.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
