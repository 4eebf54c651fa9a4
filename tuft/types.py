"""The nouns that every floor shares: plain records over numpy, no behaviour beyond their own shape.

Shape letters: ``T`` target positions of one datum, ``N`` generated tokens, ``P`` prompt tokens, ``K`` alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

LORA_ALPHA = 32.0
"""Tinker's LoRA alpha: an adapter's product is scaled by ``LORA_ALPHA / rank``."""

StopReason = Literal["stop", "length"]
CheckpointKind = Literal["training", "sampler"]


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

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Datum:
    """One training sequence: ``tokens_T`` are the inputs, ``loss_fn_inputs`` arrays aligned to the same T positions
    (``target_tokens`` int64 [T], ``weights`` float32 [T], ...)."""

    tokens_T: Int64Array
    loss_fn_inputs: Mapping[str, npt.NDArray[np.generic]]

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
class SampledSequence:
    """``tokens_N`` includes the token that stopped it; ``logprobs_N`` are those of the temperature-scaled distribution
    (at temperature 0: of the unscaled one)."""

    tokens_N: Int64Array
    logprobs_N: Float32Array
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class SampleResult:
    """``prompt_logprobs_P[0]`` is NaN: nothing precedes the first token. ``topk_prompt_*`` are ``[P, K]``, best first,
    row 0 empty (id 0, logprob -99999)."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs_P: Float32Array | None = None
    topk_prompt_ids_PK: Int64Array | None = None
    topk_prompt_logprobs_PK: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class LossResult:
    """Result of a forward or forward_backward: one float32 array a datum, of the shape of its ``target_tokens``;
    metrics keys read ``name:reduction``, and ``loss:sum`` is always there."""

    logprobs: tuple[Float32Array, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """``metrics``: ``grad_norm:mean`` (global norm before clipping), ``learning_rate:mean``, ``step:max``."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter off the device. ``weights`` are keyed as PEFT names them
    (``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``), float32.
    ``exp_avg`` and ``exp_avg_sq`` (same keys) are Adam's moments and ``gradients`` what has accumulated since the last
    step; all three are empty for weights alone. ``step`` counts optimizer updates."""

    spec: LoraSpec
    weights: Mapping[str, Float32Array]
    exp_avg: Mapping[str, Float32Array] = field(default_factory=dict)
    exp_avg_sq: Mapping[str, Float32Array] = field(default_factory=dict)
    gradients: Mapping[str, Float32Array] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What some purpose needs of a device's memory."""

    purpose: str
    num_bytes: int


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
class WeightsLoaded:
    path: str
    run_id: str


FutureResult = (
    LossResult | OptimStepResult | SampleResult | RunCreated | RunUnloaded | WeightsSaved | SamplerSaved | WeightsLoaded
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An operation that failed: the text is for the user; ``category`` as the wire calls it."""

    message: str
    category: Literal["user", "server"]
