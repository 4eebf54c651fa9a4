"""What a request may ask, checked before anything is queued or allocated. Each function raises InvalidInput."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from tuft.config import LimitsSection
from tuft.engine.base import LOSS_INPUTS, LOSS_SIGNATURES
from tuft.errors import InvalidInput
from tuft.types import AdamParams, BaseModelInfo, Datum, LoraSpec, SamplingParams

MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 24 * 3600
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
"""Logits divided by less overflow float32; by more, they are all the same."""


def check_seq(seq_id: int, field: str) -> None:
    """A client's own counter, kept as a 64-bit integer."""
    if not 0 <= seq_id < 2**63:
        raise InvalidInput(field, seq_id, "must be 0 to 2**63 - 1")


def check_lora(spec: LoraSpec, limits: LimitsSection) -> None:
    if not 1 <= spec.rank <= limits.max_rank:
        raise InvalidInput("lora_config.rank", spec.rank, f"must be 1 to {limits.max_rank}")
    if not (spec.train_attn or spec.train_mlp or spec.train_unembed):
        raise InvalidInput("lora_config", "no layers", "one of train_attn, train_mlp, train_unembed must be true")
    if spec.seed is not None and not 0 <= spec.seed < 2**63:
        raise InvalidInput("lora_config.seed", spec.seed, "must be 0 to 2**63 - 1")


def check_adam(params: AdamParams) -> None:
    for field in fields(params):
        value = getattr(params, field.name)
        if not math.isfinite(value) or value < 0:
            raise InvalidInput(f"adam_params.{field.name}", value, "must be finite and not negative")
    for name, beta in (("beta1", params.beta1), ("beta2", params.beta2)):
        if beta >= 1:
            raise InvalidInput(f"adam_params.{name}", beta, "must be below 1")


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None and not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S:
        raise InvalidInput("ttl_seconds", ttl_seconds, f"must be {MIN_TTL_S} to {MAX_TTL_S}, or absent for no expiry")


def check_loss(
    data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float | str], model: BaseModelInfo
) -> None:
    """Names the datum by its index, e.g. ``data[3].loss_fn_inputs.weights``."""
    signature = LOSS_SIGNATURES.get(loss_fn)
    if signature is None:
        raise InvalidInput("loss_fn", loss_fn, f"this server computes {', '.join(sorted(LOSS_SIGNATURES))}")
    for key in loss_fn_config:
        if key not in signature.config:
            allowed = ", ".join(sorted(signature.config)) or "no option at all"
            raise InvalidInput("loss_fn_config", key, f"{loss_fn} takes {allowed}")
    if not data:
        raise InvalidInput("data", [], "must hold at least one datum")
    for index, datum in enumerate(data):
        where = f"data[{index}]"
        check_tokens(datum.tokens_T, f"{where}.model_input", model)
        for name in sorted(signature.required - datum.loss_fn_inputs.keys()):
            raise InvalidInput(f"{where}.loss_fn_inputs", sorted(datum.loss_fn_inputs), f"{loss_fn} needs {name}")
        for name, array in datum.loss_fn_inputs.items():
            _check_loss_input(array, name, f"{where}.loss_fn_inputs.{name}", datum.num_tokens, model)


def _check_loss_input(
    array: npt.NDArray[np.generic], name: str, where: str, num_tokens: int, model: BaseModelInfo
) -> None:
    if name not in LOSS_INPUTS:
        raise InvalidInput(where, name, f"known inputs are {', '.join(sorted(LOSS_INPUTS))}")
    if array.shape != (num_tokens,):
        raise InvalidInput(where, f"shape {list(array.shape)}", f"must be [{num_tokens}], one for each input token")
    if name == "target_tokens":
        _check_ids(array, where, model)
    elif not np.isfinite(array).all():
        position = int(np.argmin(np.isfinite(array)))
        raise InvalidInput(f"{where}[{position}]", float(array[position]), "must be a finite number")


def check_tokens(tokens_T: npt.NDArray[np.int64], where: str, model: BaseModelInfo) -> None:
    """A sequence of ids that the model can read: not empty, within its context, all in its vocabulary."""
    if not 1 <= len(tokens_T) <= model.max_context_tokens:
        allowed = f"must be 1 to {model.max_context_tokens} tokens, the context of {model.name}"
        raise InvalidInput(where, f"{len(tokens_T)} tokens", allowed)
    _check_ids(tokens_T, where, model)


def _check_ids(ids: npt.NDArray[np.generic], where: str, model: BaseModelInfo) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise InvalidInput(where, str(ids.dtype), "must be integers")
    whole = ids.astype(np.int64, copy=False)
    outside = np.flatnonzero((whole < 0) | (whole >= model.vocab_size))
    if outside.size:
        position = int(outside[0])
        allowed = f"token ids of {model.name} are 0 to {model.vocab_size - 1}"
        raise InvalidInput(f"{where}[{position}]", int(whole[position]), allowed)


def check_sampling(
    prompt_tokens: Sequence[int],
    params: SamplingParams,
    num_samples: int,
    topk_prompt_logprobs: int,
    model: BaseModelInfo,
    limits: LimitsSection,
) -> None:
    check_tokens(np.asarray(prompt_tokens, dtype=np.int64), "prompt", model)
    if not 1 <= num_samples <= limits.max_num_samples:
        raise InvalidInput("num_samples", num_samples, f"must be 1 to {limits.max_num_samples}")
    if not 0 <= topk_prompt_logprobs <= min(1024, model.vocab_size):
        raise InvalidInput("topk_prompt_logprobs", topk_prompt_logprobs, f"must be 0 to {min(1024, model.vocab_size)}")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidInput("sampling_params.max_tokens", params.max_tokens, "must be at least 1")
    if params.temperature != 0 and not MIN_TEMPERATURE <= params.temperature <= MAX_TEMPERATURE:
        allowed = f"must be 0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        raise InvalidInput("sampling_params.temperature", params.temperature, allowed)
    if not 0 < params.top_p <= 1:
        raise InvalidInput("sampling_params.top_p", params.top_p, "must be above 0, and at most 1 (off)")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidInput("sampling_params.top_k", params.top_k, "must be at least 1, or -1 (off)")
    for stop in params.stop or ():
        if stop == "":
            raise InvalidInput("sampling_params.stop", stop, "must not be an empty string")
        if isinstance(stop, int) and not 0 <= stop < model.vocab_size:
            raise InvalidInput(
                "sampling_params.stop", stop, f"token ids of {model.name} are 0 to {model.vocab_size - 1}"
            )
