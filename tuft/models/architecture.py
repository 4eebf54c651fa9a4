"""What a base model looks like: the dense Llama family (Llama, Mistral, Qwen2, Qwen3), described without torch.

Shape letters: ``d`` channels of one head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tuft.errors import ModelError
from tuft.types import Float32Array

RopeKind = Literal["linear", "llama3", "yarn"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_QWEN3_HEAD_DIM = 128  # transformers' default where config.json is silent
_MISTRAL_SLIDING_WINDOW = 4096  # likewise


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training.

    ``factor`` serves every kind; ``low_freq_factor`` and ``high_freq_factor`` llama3; ``beta_*``, ``attention_factor``
    (what cos and sin are multiplied by) and ``truncate`` yarn; ``original_max_tokens`` llama3 and yarn.
    """

    kind: RopeKind
    factor: float
    original_max_tokens: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The hyperparameters of one decoder. ``qkv_bias``: biases on q, k and v (Qwen2). ``qk_norm``: RMS norm over each
    head of q and k before the rotation (Qwen3). ``max_context_tokens``: longest sequence it can compute."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any], max_context_tokens: int | None = None) -> DecoderConfig:
        """Read a Hugging Face ``config.json``, as transformers 4 or 5 writes it.

        ``max_context_tokens`` lowers the model's own limit. Raises ModelError that names what it saw and what is
        supported, for anything that this decoder would not compute exactly.
        """
        architecture = _architecture(config_json)
        _refuse_unsupported(config_json)
        num_heads = _positive_int(config_json, "num_attention_heads")
        hidden_size = _positive_int(config_json, "hidden_size")
        num_kv_heads = _positive_int(config_json, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"num_attention_heads: got {num_heads}; must be a multiple of num_key_value_heads {num_kv_heads}"
            )
        default_head_dim = _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
        rope = _rope_parameters(config_json)
        return cls(
            architecture=architecture,
            vocab_size=_positive_int(config_json, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(config_json, "intermediate_size"),
            num_layers=_positive_int(config_json, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_positive_int(config_json, "head_dim", default_head_dim),
            rms_norm_eps=float(config_json.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope, config_json),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=bool(config_json.get("tie_word_embeddings", False)),
            max_context_tokens=_max_context_tokens(config_json, architecture, max_context_tokens),
            eos_token_ids=token_ids(config_json.get("eos_token_id")),
            bos_token_id=next(iter(token_ids(config_json.get("bos_token_id"))), None),
        )

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Linear name as in PEFT to (out_features, in_features), in the order of computation; ``lm_head`` is last."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, int]] = {}
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            shapes[f"{attention}.q_proj"] = (q_size, hidden)
            shapes[f"{attention}.k_proj"] = (kv_size, hidden)
            shapes[f"{attention}.v_proj"] = (kv_size, hidden)
            shapes[f"{attention}.o_proj"] = (hidden, q_size)
            shapes[f"{mlp}.gate_proj"] = (inner, hidden)
            shapes[f"{mlp}.up_proj"] = (inner, hidden)
            shapes[f"{mlp}.down_proj"] = (hidden, inner)
        shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint under its Hugging Face name; ``lm_head.weight`` is absent where it is tied."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        for name, shape in self.linear_shapes().items():
            if name == "lm_head" and self.tie_word_embeddings:
                continue
            shapes[f"{name}.weight"] = shape
            if self.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def rope_inv_freq(self) -> Float32Array:
        """Inverse frequencies [d / 2], scaled; angles are position times these, cos and sin are then multiplied by
        ``rope_scaling.attention_factor``. float32 in transformers' order of operations, powers correctly rounded:
        within a unit or two in the last place of what models were trained with."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        pos_freqs: Float32Array = np.power(self.rope_theta, exponents.astype(np.float64)).astype(np.float32)
        inv_freq: Float32Array = np.float32(1) / pos_freqs
        scaling = self.rope_scaling
        if scaling is None:
            return inv_freq
        match scaling.kind:
            case "linear":
                return inv_freq / np.float32(scaling.factor)
            case "llama3":
                return _llama3_inv_freq(inv_freq, scaling)
            case "yarn":
                return _yarn_inv_freq(pos_freqs, scaling, self.rope_theta)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """``eos_token_id`` and its kin: absent, one id or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _architecture(config_json: Mapping[str, Any]) -> str:
    named = config_json.get("architectures") or [_ARCHITECTURES.get(config_json.get("model_type", ""))]
    if named[0] not in _ARCHITECTURES.values():
        seen = named[0] or f"model_type {config_json.get('model_type')!r}"
        raise ModelError(f"architecture {seen} is not supported; supported: {', '.join(_ARCHITECTURES.values())}")
    return str(named[0])


def _refuse_unsupported(config_json: Mapping[str, Any]) -> None:
    """Options that change the computation and that the decoder does not have."""
    if config_json.get("quantization_config"):
        method = config_json["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"quantization_config: got {method!r}; "
            "only unquantized safetensors (float32, bfloat16, float16) and GGUF are supported"
        )
    for option, allowed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        if config_json.get(option, allowed) != allowed:
            raise ModelError(f"{option}: got {config_json[option]!r}; only {allowed!r} is supported")


def _positive_int(config_json: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config_json.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{key}: got {value!r}; must be a positive integer")
    return value


def _max_context_tokens(config_json: Mapping[str, Any], architecture: str, wanted: int | None) -> int:
    own = _positive_int(config_json, "max_position_embeddings")
    if wanted is not None and wanted > own:
        raise ModelError(f"max_context_tokens: got {wanted}; the model's own limit is {own}")
    tokens = own if wanted is None else wanted
    window = _sliding_window(config_json, architecture)
    if window is not None and tokens > window:
        raise ModelError(
            f"sliding_window {window} is shorter than the context of {tokens} tokens, and sliding "
            f"windows are not supported; set max_context_tokens to at most {window}"
        )
    return tokens


def _sliding_window(config_json: Mapping[str, Any], architecture: str) -> int | None:
    """Tokens that a layer looks back where it does not see everything; None if every layer sees everything."""
    if architecture == "LlamaForCausalLM":
        return None
    window: int | None = config_json.get("sliding_window", _MISTRAL_SLIDING_WINDOW)
    if architecture == "MistralForCausalLM":
        return window
    if not config_json.get("use_sliding_window", False):
        return None
    if "layer_types" in config_json:
        slides = "sliding_attention" in config_json["layer_types"]
    else:
        slides = config_json.get("max_window_layers", 28) < config_json["num_hidden_layers"]
    return window if slides else None


def _rope_parameters(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The rope dictionary of either layout, with ``rope_theta`` and ``rope_type`` always set.

    transformers 5 writes ``rope_parameters`` with everything in it; 4 wrote ``rope_theta`` beside ``rope_scaling``,
    whose type is keyed ``rope_type`` or, older still, ``type``.
    """
    rope = dict(config_json.get("rope_scaling") or config_json.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"rope_parameters: got one entry a layer type ({', '.join(rope)}); must be one for all")
    rope.setdefault("rope_theta", config_json.get("rope_theta", 10_000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ModelError(f"rope_type: got {rope['rope_type']!r}; supported: {', '.join(_ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"partial_rotary_factor: got {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    return rope


def _rope_scaling(rope: Mapping[str, Any], config_json: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope["rope_type"]
    if kind == "default":
        return None
    original = config_json.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(original or config_json["max_position_embeddings"])
    numbers = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for key in numbers:
        if not isinstance(rope.get(key), int | float):
            raise ModelError(f"rope_parameters.{key}: got {rope.get(key)!r}; {kind} rope needs a number")
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]), original)
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(rope["factor"]),
            original,
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
        )
    attention_factor = rope.get("attention_factor")
    return RopeScaling(
        kind,
        float(rope["factor"]),
        original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=_yarn_attention_factor(rope) if attention_factor is None else float(attention_factor),
        truncate=bool(rope.get("truncate", True)),
    )


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """Section 3.4 of the YaRN paper (arXiv 2309.00071), with DeepSeek's ``mscale`` pair where it is given."""

    factor = float(rope["factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def _llama3_inv_freq(inv_freq: Float32Array, scaling: RopeScaling) -> Float32Array:
    """Long waves are stretched by ``factor``, short ones kept, and those between blended (Llama 3.1)."""
    wavelength = np.float32(2 * math.pi) / inv_freq
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    original, factor = np.float32(scaling.original_max_tokens), np.float32(scaling.factor)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    kept_or_stretched = np.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, blended, kept_or_stretched)


def _yarn_inv_freq(pos_freqs: Float32Array, scaling: RopeScaling, rope_theta: float) -> Float32Array:
    """Channels that turn more than ``beta_fast`` times within the original context are kept, those that turn fewer
    than ``beta_slow`` times are stretched by ``factor``, with a linear ramp between."""
    head_dim = 2 * len(pos_freqs)

    def channel(num_turns: float) -> float:
        angle = num_turns * 2 * math.pi
        return head_dim * math.log(scaling.original_max_tokens / angle) / (2 * math.log(rope_theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    steps = np.arange(head_dim // 2, dtype=np.float32)
    stretched = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - stretched
    inv_freq: Float32Array = 1 / (np.float32(scaling.factor) * pos_freqs) * (1 - kept) + 1 / pos_freqs * kept
    return inv_freq
