"""What the service may know of the engine: the commands it takes and the replies it gives. No torch here.

A *batch* is a tuple of commands computed in one pass; every command has its own reply, delivered as soon as it is
known. ``engine.worker.EngineProcess.submit(batch)`` returns one ``concurrent.futures.Future`` a command.
An adapter is named by its ``adapter_id``: for a training run the run's id, for frozen sampler weights the sampler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tuft.losses import CustomLoss
from tuft.types import AdapterState, BaseModelInfo, Datum, LoraSpec, Optimizer, OptimizerParams, SampleSpec


@dataclass(frozen=True, slots=True)
class BaseModelSource:
    """Where a base model comes from. ``path``: a GGUF file, a directory with config.json and safetensors, or a hub id.
    ``tokenizer_dir``: where tokenizer files are written (GGUF) or linked from; it is created if missing."""

    name: str
    path: str
    tokenizer_dir: str
    aliases: tuple[str, ...] = ()
    max_context_tokens: int | None = None
    precision: Literal["auto", "bf16", "float32"] = "auto"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """``micro_batch_tokens`` bounds the tokens of one forward and backward (0: what suits the device);
    ``kv_cache_tokens`` what all sequences being sampled may hold together. ``adapter_memory_gib`` bounds what adapters
    hold of a GPU's memory (None: what is left). ``num_threads`` 0 leaves torch's own choice. ``kernel_cache``: where
    compiled CPU kernels are kept; None computes with torch's own operators. ``packed_decode``: keep weights a second
    time, for products of few rows. ``deterministic``: the same operations give the same bits in every life of the
    process (None: where the device can). ``memory_limit_gib``: what everything may take of the host's memory together
    (None: what the machine or its container has)."""

    device: str = "auto"
    kernel_cache: str | None = None
    micro_batch_tokens: int = 1024
    kv_cache_tokens: int = 65_536
    max_decode_rows: int = 32
    packed_decode: bool = True
    adapter_memory_gib: float | None = None
    num_threads: int = 0
    deterministic: bool | None = None
    memory_limit_gib: float | None = None


@dataclass(frozen=True, slots=True)
class CreateAdapter:
    """New trainable adapter: A drawn from ``spec.seed``, B zero. Reply: None."""

    adapter_id: str
    base_model: str
    spec: LoraSpec
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Create or overwrite an adapter of ``state.optimizer`` (moments and gradients reset where ``state`` has none).
    ``trainable`` False makes frozen sampler weights: no gradient or moment buffers. Reply: None."""

    adapter_id: str
    base_model: str
    state: AdapterState
    trainable: bool


@dataclass(frozen=True, slots=True)
class CopyAdapter:
    """Freeze the present weights of ``source_id`` under ``adapter_id`` for sampling. Reply: None."""

    source_id: str
    adapter_id: str


@dataclass(frozen=True, slots=True)
class ExportAdapter:
    """Reply: AdapterState; weights alone, or with moments, step and accumulated gradients."""

    adapter_id: str
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Forget an adapter; unknown ids are fine. Reply: None."""

    adapter_id: str


@dataclass(frozen=True, slots=True)
class RunLoss:
    """A part of one forward (``backward`` False) or forward_backward: data of it that are computed in one pass.

    An operation is cut into parts (``tuft.prefixes.cut``), sent in order, each once; one that fits a pass is a single
    part. ``operation_id`` tells which parts belong together, ``first_datum`` is how many data the parts before it hold.
    ``datum_numbers`` are the places of the part's data in the order the user gave; without any, they are numbered on
    from ``first_datum``. The reply to the last part is the LossResult of all of it, in the user's order; to the others
    it is None. If a part fails, so do all that follow, with the same error. Gradients are added to the adapter's only
    when the last part has succeeded, so a failed operation leaves none. ``custom_loss`` is computed instead of one that
    ``loss_fn`` would name. A part that goes ``ahead`` is computed before what waits of other adapters.
    ``sampling_share``: for how long to sample behind it, beside the time that it took.
    """

    adapter_id: str
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: tuple[tuple[str, float | str], ...] = ()
    backward: bool = True
    operation_id: str = ""
    first_datum: int = 0
    datum_numbers: tuple[int, ...] = ()
    is_last: bool = True
    custom_loss: CustomLoss | None = None
    ahead: bool = False
    sampling_share: float = 1.0

    @property
    def numbers(self) -> Sequence[int]:
        """Of each datum, the number by which its user knows it: ``data[number]`` of the whole operation."""
        return self.datum_numbers or range(self.first_datum, self.first_datum + len(self.data))

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.data)


@dataclass(frozen=True, slots=True)
class OptimStep:
    """One update from the accumulated gradients, which are then zero; ``params`` are of the family of the adapter's
    optimizer. Reply: OptimStepResult."""

    adapter_id: str
    params: OptimizerParams


@dataclass(frozen=True, slots=True)
class Sample:
    """Sample as ``spec`` says. ``adapter_id`` None samples the base model. Reply: SampleResult.

    A prompt's beginning that was computed before is not computed again, but only within one ``cache_scope``: the
    service gives the tenant's id, so that nobody can tell from a quick answer what another has asked. Tenants who
    sample at once have of the time what their ``weight`` says.
    """

    base_model: str
    adapter_id: str | None
    spec: SampleSpec
    cache_scope: str = ""
    sample_id: str = ""
    tenant_id: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CancelSample:
    """Compute no more of the sample of that id, wherever it is: it is answered with a UserError. One that is unknown,
    or has ended, is fine. Reply: None."""

    sample_id: str


@dataclass(frozen=True, slots=True)
class CheckCustomLoss:
    """Whether a client's own loss may be computed. Reply: None, or InvalidInput that names what is not allowed."""

    loss: CustomLoss


Command = (
    CreateAdapter
    | LoadAdapter
    | CopyAdapter
    | ExportAdapter
    | DropAdapter
    | RunLoss
    | OptimStep
    | Sample
    | CancelSample
    | CheckCustomLoss
)


class Engine(Protocol):
    """The mailbox as the service sees it. Implemented by ``engine.worker.EngineProcess``."""

    @property
    def base_models(self) -> Sequence[BaseModelInfo]:
        """Models that are loaded and can compute; empty until the engine is ready."""
        ...

    @property
    def pass_tokens(self) -> int:
        """Most rows of one pass, once ``base_models`` are loaded."""
        ...

    @property
    def generation(self) -> int:
        """How often the engine has started. An adapter lives in one generation only."""
        ...

    def submit(self, batch: Sequence[Command]) -> list[Future[Any]]:
        """Queue commands to be computed in one pass, after everything submitted before (samples run beside training).

        Each future ends with the command's reply or with a TuftError; EngineDied when the process ended.
        """
        ...

    def close(self) -> None:
        """End the process; work it still holds fails with EngineDied."""
        ...
