from __future__ import annotations

from typing import get_args

import pytest

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
from tuft.types import LoraSpec, SampleSpec, SamplingParams

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


def test_every_call_is_tried() -> None:
    assert {type(call) for call in CALLS} == set(get_args(Call))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_a_call_outlives_its_process(call: Call) -> None:
    assert ENCODING.decode(ENCODING.encode(call)) == call


async def test_every_call_of_a_run_is_done_by_somebody(services: Services) -> None:
    beside = {SampleCall, CheckLoss, UnloadRun}
    assert set(services._scheduler._performers) == set(get_args(Call)) - beside
