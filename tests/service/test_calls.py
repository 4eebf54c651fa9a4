from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from tuft.engine.base import OptimStep, RunLoss
from tuft.losses import CustomLoss
from tuft.records import Tenant
from tuft.service.calls import (
    ENCODING,
    Call,
    CheckLoss,
    CreateRun,
    CreateRunFromCheckpoint,
    LoadWeights,
    Rejected,
    SampleCall,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
    UnloadRun,
)
from tuft.service.services import Services
from tuft.types import (
    AdamParams,
    CustomLossCreated,
    Datum,
    DimuonParams,
    ExternalSaved,
    Failure,
    FutureResult,
    LoraSpec,
    LossResult,
    Matrix,
    OptimStepResult,
    PromptScoring,
    ProvenanceSpan,
    RunCreated,
    RunUnloaded,
    SampledSequence,
    SampleResult,
    SamplerSaved,
    SampleSpec,
    SamplingParams,
    TokenLogprobs,
    WeightsLoaded,
    WeightsSaved,
)

CALLS = (
    CreateRun("model", LoraSpec(seed=3), "adamw", {"a": "b"}),
    CreateRunFromCheckpoint("tinker://r/weights/x", True, None, "dimuon", {}, (Tenant("t", "alice"),)),
    LoadWeights("tinker://r/weights/x", False, None, (Tenant("t", "alice"), Tenant("u", "bob"))),
    SaveWeights("x", 60, True, {}),
    SaveForSampler(None, 7, None, {}, "inflight"),
    SaveExternal("x", None, ("age1",)),
    Rejected("no", "user"),
    SampleCall(SampleSpec((1, 2), SamplingParams(stop=("a", "b"), temperature=0.3)), True),
    CheckLoss("session", CustomLoss("x", (("logprobs", 1),), "[]")),
    UnloadRun("run"),
)


TOKENS, LOGPROBS = np.arange(4), np.asarray([0.1, -np.inf, np.nan, -2.5], np.float32)
TOPK = TokenLogprobs(np.arange(6).reshape(2, 3), np.zeros((2, 3), np.float32))
RESULTS = (
    LossResult((LOGPROBS, np.zeros((2, 3), np.float32)), {"loss:sum": 0.1 + 0.2}),
    OptimStepResult({"grad_norm:mean": 1e-300}),
    SampleResult(
        (SampledSequence(TOKENS, LOGPROBS, "stop", TOPK), SampledSequence(TOKENS[:0], LOGPROBS[:0], "length")),
        LOGPROBS,
        TOPK,
        Matrix(LOGPROBS, (2, 2)),
        TOPK,
        3,
    ),
    RunCreated("run"),
    RunUnloaded("run"),
    WeightsSaved("tinker://r/weights/x"),
    SamplerSaved(None, "session:sample:0"),
    ExternalSaved("tinker://r/external/x", 2**40),
    WeightsLoaded("tinker://r/weights/x", "run"),
    CustomLossCreated("session:loss:0"),
    Failure("no", "user", ("run", "r"), True),
)


def test_every_call_is_tried() -> None:
    assert {type(call) for call in CALLS} == set(get_args(Call))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_a_call_outlives_its_process(call: Call) -> None:
    assert ENCODING.decode(ENCODING.encode(call)) == call


async def test_every_call_of_a_run_is_done_by_somebody(services: Services) -> None:
    beside = {SampleCall, CheckLoss, UnloadRun}
    assert set(services._scheduler._performers) == set(get_args(Call)) - beside


def test_every_result_is_tried() -> None:
    assert {type(result) for result in RESULTS} == {*get_args(FutureResult), Failure}


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_outlives_its_process_to_the_bit(result: FutureResult | Failure) -> None:
    content = ENCODING.encode(result)
    again = ENCODING.decode(content)
    assert type(again) is type(result)
    assert ENCODING.encode(again) == content


@pytest.mark.parametrize(
    "work",
    [
        RunLoss("run", (Datum(TOKENS, {"target_tokens": TOKENS}, (ProvenanceSpan("q:0:0", True, 0, 4),)),), "ppo"),
        OptimStep("run", DimuonParams(1e-3)),
        OptimStep("run", AdamParams()),
        SampleCall(SampleSpec((1,), SamplingParams(seed=3), 2, 1, PromptScoring(logprobs=True))),
    ],
    ids=["loss", "dimuon", "adam", "sample"],
)
def test_work_outlives_its_process_to_the_bit(work: Any) -> None:
    content = ENCODING.encode(work)
    assert ENCODING.encode(ENCODING.decode(content)) == content


def records_of(kind: Any) -> Iterator[type]:
    """The dataclasses that a value of this type may hold, itself among them."""
    if isinstance(kind, UnionType) or get_args(kind):
        for part in get_args(kind):
            yield from records_of(part)
    elif isinstance(kind, type) and is_dataclass(kind):
        yield kind
        for part in get_type_hints(kind).values():
            yield from records_of(part)


def test_whatever_may_be_journaled_is_listed_and_nothing_else() -> None:
    journaled = {*records_of(Call), *records_of(FutureResult), *records_of(RunLoss), *records_of(OptimStep), Failure}
    assert set(ENCODING._classes.values()) == journaled
