"""What a sample request may ask, checked before anything is queued or allocated. Each function raises InvalidInput."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.tokens import check_tokens
from tuft.types import BaseModelInfo, Matrix, PromptScoring, SampleSpec, SamplingParams

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
"""Logits divided by less overflow float32; by more, they are all the same."""


def check_sampling(spec: SampleSpec, model: BaseModelInfo, limits: LimitsSection) -> None:
    num_prompt = len(spec.prompt_tokens)
    check_tokens(np.asarray(spec.prompt_tokens, dtype=np.int64), "prompt", model)
    if not 1 <= spec.num_samples <= limits.max_num_samples:
        raise InvalidInput(
            "num_samples", spec.num_samples, f"must be 1 to {limits.max_num_samples} (limits.max_num_samples)"
        )
    _check_params(spec.params)
    _check_stops(spec.params.stop or (), model, limits)
    room = max(1, model.max_context_tokens - num_prompt)
    num_sampled = spec.num_samples * min(spec.params.max_tokens or room, room)
    _check_width("topk_sample_logprobs", spec.topk_logprobs, num_sampled, "sampled", model, limits)
    _check_width("topk_prompt_logprobs", spec.scoring.topk, num_prompt, "prompt", model, limits)
    _check_width("prompt_alt_tokens_k", spec.scoring.num_alternatives, num_prompt, "prompt", model, limits)
    _check_last_n(spec.scoring, num_prompt)
    if spec.scoring.targets is not None:
        _check_targets(spec.scoring.targets, num_prompt, model, limits)


def _check_params(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidInput("sampling_params.max_tokens", params.max_tokens, "must be at least 1")
    if params.temperature != 0 and not MIN_TEMPERATURE <= params.temperature <= MAX_TEMPERATURE:
        allowed = f"must be 0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        raise InvalidInput("sampling_params.temperature", params.temperature, allowed)
    if not 0 < params.top_p <= 1:
        raise InvalidInput("sampling_params.top_p", params.top_p, "must be above 0, and at most 1 (off)")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidInput("sampling_params.top_k", params.top_k, "must be at least 1, or -1 (off)")


def _check_stops(stops: Sequence[str | int], model: BaseModelInfo, limits: LimitsSection) -> None:
    """Every token that is sampled is compared with every stop string."""
    most, longest = limits.max_stops, limits.max_stop_bytes
    if len(stops) > most:
        raise InvalidInput(
            "sampling_params.stop", f"{len(stops)} of them", f"must be at most {most} (limits.max_stops)"
        )
    for stop in stops:
        if isinstance(stop, str) and not 1 <= len(stop.encode()) <= longest:
            allowed = f"strings must have 1 to {longest} bytes in UTF-8 (limits.max_stop_bytes)"
            raise InvalidInput("sampling_params.stop", stop, allowed)
        if isinstance(stop, int) and not 0 <= stop < model.vocab_size:
            raise InvalidInput(
                "sampling_params.stop", stop, f"token ids of {model.name} are 0 to {model.vocab_size - 1}"
            )


def _check_width(
    field: str, width: int, num_places: int, kind: str, model: BaseModelInfo, limits: LimitsSection
) -> None:
    """``width`` tokens at each of ``num_places``."""
    largest = min(limits.max_topk, model.vocab_size)
    if not 0 <= width <= largest:
        source = "limits.max_topk" if largest == limits.max_topk else f"the vocabulary of {model.name}"
        raise InvalidInput(field, width, f"must be 0 to {largest} ({source})")
    most = limits.max_logprobs
    if width * num_places > most:
        allowed = f"must be at most {most // num_places} for {num_places} {kind} tokens (limits.max_logprobs: {most})"
        raise InvalidInput(field, width, allowed)


def _check_last_n(scoring: PromptScoring, num_prompt: int) -> None:
    if scoring.last_n is None:
        return
    if not scoring.logprobs:
        raise InvalidInput("prompt_logprobs_last_n", scoring.last_n, "applies to prompt logprobs: set prompt_logprobs")
    if not 1 <= scoring.last_n < num_prompt:
        allowed = f"must be 1 to {num_prompt - 1} for a prompt of {num_prompt} tokens"
        raise InvalidInput("prompt_logprobs_last_n", scoring.last_n, allowed)


def _check_targets(targets: Matrix, num_prompt: int, model: BaseModelInfo, limits: LimitsSection) -> None:
    field = "target_prompt_logprobs"
    num_rows, width = targets.shape
    if num_rows != num_prompt - 1:
        allowed = f"must have {num_prompt - 1} rows, one for each prompt token after the first"
        raise InvalidInput(f"{field}.shape", list(targets.shape), allowed)
    if width > limits.max_topk:
        allowed = f"must have at most {limits.max_topk} columns (limits.max_topk)"
        raise InvalidInput(f"{field}.shape", list(targets.shape), allowed)
    ids_M = targets.values_M
    if ids_M.dtype != np.int64:
        raise InvalidInput(f"{field}.dtype", str(ids_M.dtype), "must be int64")
    if len(ids_M) > limits.max_logprobs:
        allowed = f"must be at most {limits.max_logprobs} (limits.max_logprobs); send a sparse tensor"
        raise InvalidInput(f"{field}.data", f"{len(ids_M)} ids", allowed)
    outside_M = (ids_M < -1) | (ids_M >= model.vocab_size)
    if outside_M.any():
        index = int(outside_M.argmax())
        allowed = f"must be -1 (nothing), or a token id of {model.name}, 0 to {model.vocab_size - 1}"
        raise InvalidInput(f"{field}.data[{index}]", int(ids_M[index]), allowed)
    if not (ids_M >= 0).any():
        raise InvalidInput(field, "no id", "must name at least one token id")
