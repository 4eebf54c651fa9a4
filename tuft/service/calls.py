"""What clients asked for, as records: journaled before it is acknowledged, done now or by a later process.

``forward_backward`` and ``optim_step`` are the engine's own ``RunLoss`` and ``OptimStep``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tuft.encoding import Encoding
from tuft.engine.base import OptimStep, RunLoss
from tuft.losses import CustomLoss
from tuft.records import Tenant
from tuft.types import (
    AdamParams,
    CustomLossCreated,
    Datum,
    DimuonParams,
    ExternalSaved,
    Failure,
    LoraSpec,
    LossResult,
    Matrix,
    Optimizer,
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


@dataclass(frozen=True, slots=True)
class CreateRun:
    """Begin the run with a fresh adapter."""

    base_model: str
    spec: LoraSpec
    optimizer: Optimizer
    user_metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CreateRunFromCheckpoint:
    """Begin the run with what a checkpoint holds, which one of ``readers`` may read."""

    path: str
    with_optimizer: bool
    base_model: str | None
    optimizer: Optimizer | None
    user_metadata: Mapping[str, str]
    readers: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Replace the run's weights by those of a checkpoint, which one of ``readers`` may read."""

    path: str
    with_optimizer: bool
    optimizer: Optimizer | None
    readers: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class SaveWeights:
    """A training checkpoint: weights, moments, step and accumulated gradients."""

    name: str
    ttl_seconds: int | None
    overwrite: bool
    user_metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SaveForSampler:
    """The weights alone: under ``name``, or in a sampling session of the number given."""

    name: str | None
    sampling_session_seq_id: int | None
    ttl_seconds: int | None
    user_metadata: Mapping[str, str]
    kind: str = "snapshot"


@dataclass(frozen=True, slots=True)
class SaveExternal:
    """PEFT's files, encrypted to ``recipients`` if there are any."""

    name: str
    ttl_seconds: int | None
    recipients: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A call that cannot be honoured; it takes its turn all the same, since its client counts on."""

    message: str
    category: Literal["user", "server"]
    refused: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SampleCall:
    """``record_stability_info``: remember the sequences for stable_reinforce."""

    spec: SampleSpec
    record_stability_info: bool = False


@dataclass(frozen=True, slots=True)
class CheckLoss:
    """Whether a loss that a client wrote may be used in its session."""

    session_id: str
    loss: CustomLoss


@dataclass(frozen=True, slots=True)
class UnloadRun:
    """End the run; its checkpoints stay."""

    run_id: str


Call = (
    CreateRun
    | CreateRunFromCheckpoint
    | LoadWeights
    | SaveWeights
    | SaveForSampler
    | SaveExternal
    | Rejected
    | SampleCall
    | CheckLoss
    | UnloadRun
)
"""All but losses and steps: work of the service itself, and a barrier where it is an operation of a run."""

NEEDS_NO_ADAPTER = (CreateRun, CreateRunFromCheckpoint, LoadWeights, Rejected)
"""Operations that make the run's state, or leave it alone."""

ENCODING = Encoding(
    [
        *(RunLoss, OptimStep, CustomLoss, Datum, ProvenanceSpan, AdamParams, DimuonParams),
        *(CreateRun, CreateRunFromCheckpoint, LoadWeights, SaveWeights, SaveForSampler, SaveExternal, Rejected),
        *(SampleCall, CheckLoss, UnloadRun, LoraSpec, Tenant, SampleSpec, SamplingParams, PromptScoring),
        *(LossResult, OptimStepResult, SampleResult, SampledSequence, Matrix, TokenLogprobs),
        *(RunCreated, RunUnloaded, WeightsSaved, SamplerSaved, ExternalSaved, WeightsLoaded, CustomLossCreated),
        Failure,
    ]
)
"""Of everything that is journaled."""
