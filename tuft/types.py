"""The nouns that every floor shares: plain records over numpy, no behaviour beyond their own shape.

Shape letters: ``T`` target positions of one datum, ``N`` generated tokens, ``P`` prompt tokens, ``K`` alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

LORA_ALPHA = 32.0
"""Tinker's LoRA alpha: an adapter's product is scaled by ``LORA_ALPHA / rank``."""

StopReason = Literal["stop", "length"]
CheckpointKind = Literal["training", "sampler", "external"]
"""``external``: PEFT's files, perhaps encrypted, to be downloaded; it is never loaded."""
Optimizer = Literal["adamw", "dimuon"]
"""A family of optimizers: a run has one for life, since another could not read its moments."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What a client chooses about an adapter. ``seed`` fixes the initial A matrices; None draws one."""

    rank: int = 32
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def scale(self) -> float:
        return LORA_ALPHA / self.rank


@dataclass(frozen=True, slots=True)
class AdamParams:
    """AdamW with Tinker's defaults. Weight decay is decoupled; ``grad_clip_norm`` 0 switches clipping off."""

    family: ClassVar[Optimizer] = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class DimuonParams:
    """Dimuon with Tinker's defaults; ``engine.dimuon`` has the formulas. ``grad_clip_norm`` 0 or less switches clipping
    off. SDKs 0.29.1 to 0.30.2 let the user choose the last two, later ones leave them out."""

    family: ClassVar[Optimizer] = "dimuon"
    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    damping: float = 1e-4
    rank_lr_correction_exponent: float = 0.175


OptimizerParams = AdamParams | DimuonParams


@dataclass(frozen=True, slots=True)
class ProvenanceSpan:
    """``length`` consecutive tokens that are those of a sampled sequence from ``offset`` on: of the sequence itself if
    ``is_sampled``, else of the prompt that it continued."""

    sequence_id: str
    is_sampled: bool
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Datum:
    """One training sequence: ``tokens_T`` are the inputs, ``loss_fn_inputs`` arrays aligned to the same T positions
    (``target_tokens`` int64 [T], ``weights`` float32 [T], ...). ``input_spans`` and ``target_spans`` say where inputs
    and targets come from, end to end, if their sender does."""

    tokens_T: Int64Array
    loss_fn_inputs: Mapping[str, npt.NDArray[np.generic]]
    input_spans: tuple[ProvenanceSpan, ...] = ()
    target_spans: tuple[ProvenanceSpan, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. ``stop`` None means the model's own end-of-sequence tokens; an empty tuple means none;
    strings or token ids replace them. ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1 are off."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as its sender laid it out: ``values_M`` are its cells row by row, all of them or, with ``crow`` and
    ``col`` (compressed sparse rows), those listed."""

    values_M: npt.NDArray[Any]
    shape: tuple[int, int]
    crow: Int64Array | None = None
    col: Int64Array | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.values_M, self.crow, self.col)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def rows_M(self) -> Int64Array:
        """The row of each value; it never falls."""
        num_rows, num_columns = self.shape
        return np.repeat(np.arange(num_rows), num_columns if self.crow is None else np.diff(self.crow))


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """What is asked about a prompt of P tokens; nothing precedes the first, so that it has no logprob.

    ``logprobs`` of its own tokens, and ``topk`` likeliest ones at each place; ``last_n`` bounds both to the last tokens
    (None: all). ``targets``: ids ``[P - 1, K]`` whose logprobs are wanted, row i at the place of token i + 1, -1 where
    none is. ``num_alternatives``: tokens to draw at each of these places, at the request's temperature, out of the
    whole vocabulary. Every logprob is one of temperature 1, like the trainer's.
    """

    logprobs: bool = False
    topk: int = 0
    last_n: int | None = None
    targets: Matrix | None = None
    num_alternatives: int = 0


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What a client asks of a sampler. ``topk_logprobs``: how many of the likeliest tokens at each sampled position."""

    prompt_tokens: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    num_samples: int = 1
    topk_logprobs: int = 0
    scoring: PromptScoring = PromptScoring()


EMPTY_LOGPROB = -99999.0
"""The API's logprob of an empty cell, whose id is 0."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """K tokens at each of L places; of the likeliest, the best is first."""

    ids_LK: Int64Array
    logprobs_LK: Float32Array

    @property
    def nbytes(self) -> int:
        return self.ids_LK.nbytes + self.logprobs_LK.nbytes


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """``tokens_N`` includes the token that stopped it. ``logprobs_N``, and those of the likeliest tokens ``topk`` at
    each position, are of the temperature-scaled distribution (at temperature 0: of the unscaled one)."""

    tokens_N: Int64Array
    logprobs_N: Float32Array
    stop_reason: StopReason
    topk: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What ``PromptScoring`` asked for, and only that. Of ``prompt_logprobs_P`` (NaN) and ``topk_prompt`` (empty cells)
    the first row and those before ``last_n`` hold nothing; ``target_prompt_logprobs`` has the layout of the targets,
    0 where nothing was wanted; ``prompt_alternatives`` are ``[P - 1, K]``. ``prompt_cache_hit_tokens``: how many tokens
    of the prompt did not have to be computed."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs_P: Float32Array | None = None
    topk_prompt: TokenLogprobs | None = None
    target_prompt_logprobs: Matrix | None = None
    prompt_alternatives: TokenLogprobs | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LossResult:
    """Result of a forward or forward_backward: one float32 array a datum, of the shape of its ``target_tokens``;
    metrics keys read ``name:reduction``, and ``loss:sum`` is always there."""

    logprobs: tuple[Float32Array, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """``metrics``: ``grad_norm:mean`` (global norm before clipping), ``learning_rate:mean``, ``step:max``; of dimuon
    also ``update_norm:mean`` and ``effective_rank:mean`` (``engine.dimuon.DimuonUpdate``)."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter off the device. ``weights`` are keyed as PEFT names them
    (``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``), float32.
    ``exp_avg`` and ``exp_avg_sq`` (same keys) are the moments that ``optimizer`` keeps (dimuon the first alone) and
    ``gradients`` what has accumulated since the last step; all are empty for weights alone. ``step`` counts updates."""

    spec: LoraSpec
    weights: Mapping[str, Float32Array]
    exp_avg: Mapping[str, Float32Array] = field(default_factory=dict)
    exp_avg_sq: Mapping[str, Float32Array] = field(default_factory=dict)
    gradients: Mapping[str, Float32Array] = field(default_factory=dict)
    step: int = 0
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What some purpose needs of a device's memory."""

    purpose: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryShares:
    """What passes, and what all adapters together, may take of the host's memory, and what a pass takes, in bytes. A
    pass of up to ``pass_tokens`` rows takes ``row_bytes`` each, a longer sequence, whose activations are not kept,
    ``long_row_bytes``; either takes ``fixed_bytes`` beside."""

    pass_bytes: int
    adapter_bytes: int
    pass_tokens: int
    row_bytes: int
    long_row_bytes: int
    fixed_bytes: int


@dataclass(frozen=True, slots=True)
class BaseModelInfo:
    """What everyone may know of a loaded base model. ``tokenizer_dir`` holds tokenizer.json, tokenizer_config.json
    and config.json as Hugging Face writes them."""

    name: str
    aliases: tuple[str, ...]
    architecture: str
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    precision: Literal["bf16", "float32"]
    eos_token_ids: tuple[int, ...]
    tokenizer_dir: str
    linear_shapes: Mapping[str, tuple[int, int]]
    """Linear name as in PEFT (``model.layers.0.self_attn.q_proj``, ``lm_head``) to (out_features, in_features)."""
    memory_plan: tuple[MemoryNeed, ...] = ()
    memory: MemoryShares | None = None
    """None where the host's memory is not what bounds it: on a GPU."""


# --- what a settled future holds, beside LossResult, OptimStepResult and SampleResult ---------------------------------


@dataclass(frozen=True, slots=True)
class RunCreated:
    run_id: str


@dataclass(frozen=True, slots=True)
class RunUnloaded:
    run_id: str


@dataclass(frozen=True, slots=True)
class WeightsSaved:
    """``path`` is the tinker path of the training checkpoint."""

    path: str


@dataclass(frozen=True, slots=True)
class SamplerSaved:
    """Named: ``path`` of the sampler checkpoint. Ephemeral: ``sampling_session_id``. Never both."""

    path: str | None
    sampling_session_id: str | None


@dataclass(frozen=True, slots=True)
class ExternalSaved:
    """``path`` is the tinker path of the external checkpoint, ``size_bytes`` that of its files."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightsLoaded:
    path: str
    run_id: str


@dataclass(frozen=True, slots=True)
class CustomLossCreated:
    loss_id: str


FutureResult = (
    LossResult
    | OptimStepResult
    | SampleResult
    | RunCreated
    | RunUnloaded
    | WeightsSaved
    | SamplerSaved
    | ExternalSaved
    | WeightsLoaded
    | CustomLossCreated
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation that failed: the text is for the user; ``category`` as the wire calls it. ``refused``: what it
    asked for in vain, see ``errors.refusing``. ``is_spent``: it has changed its run all the same."""

    message: str
    category: Literal["user", "server"]
    refused: tuple[str, str] | None = field(default=None, compare=False)
    is_spent: bool = field(default=False, compare=False)
