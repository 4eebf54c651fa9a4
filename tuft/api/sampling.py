"""Sampling sessions and samples."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tuft.api import wire
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, off_loop, parse, read_body
from tuft.api.wire import NOT_SUPPORTED
from tuft.errors import InvalidInput
from tuft.types import SamplingParams

router = APIRouter(tags=["sampling"])

Stop = tuple[str, ...] | tuple[int, ...] | None


class CreateSamplingSession(Fields):
    session_id: str
    sampling_session_seq_id: ClientSeq
    base_model: str | None = None
    model_path: str | None = None


class SamplingFields(Fields):
    """As ``SamplingParams``, with every way to write ``stop``."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Fields):
    sampling_session_id: str
    seq_id: ClientSeq
    prompt: Any
    sampling_params: SamplingFields = SamplingFields()
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


_UNSUPPORTED = (
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
    "record_stability_info",
)


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    body = parse(CreateSamplingSession, await read_body(request))
    sampler = services.samplers.create(
        tenant, body.session_id, body.sampling_session_seq_id, body.base_model, body.model_path
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, tenant: Caller, services: Served) -> dict[str, Any]:
    sampler = services.samplers.get(tenant, sampler_id)
    return {"sampler_id": sampler.sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/asample")
async def asample(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """Samples need no order, so a wrong request is refused here and now."""
    content = await read_body(request, services.config.limits.max_request_bytes)
    body = await off_loop(len(content), parse, Sample, content)
    for field in _UNSUPPORTED:
        value = getattr(body, field)
        if value:
            raise InvalidInput(field, value, NOT_SUPPORTED)
    prompt_P = wire.prompt_tokens_json(body.prompt, "prompt")
    asked = body.sampling_params
    params = SamplingParams(
        max_tokens=asked.max_tokens,
        seed=asked.seed,
        stop=_stop(asked.stop),
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
    )
    request_id, sequence_ids = services.samplers.sample(
        tenant,
        body.sampling_session_id,
        body.seq_id,
        tuple(prompt_P.tolist()),
        params,
        body.num_samples,
        bool(body.prompt_logprobs),
        body.topk_prompt_logprobs,
    )
    return {"request_id": request_id, "sample_sequence_ids": sequence_ids}


def _stop(value: object) -> Stop:
    """A string, strings or token ids; None leaves the model's own end, an empty list means no end at all."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        strings = tuple(stop for stop in value if isinstance(stop, str))
        ids = tuple(stop for stop in value if isinstance(stop, int) and not isinstance(stop, bool))
        if len(strings) == len(value):
            return strings
        if len(ids) == len(value):
            return ids
    raise InvalidInput("sampling_params.stop", value, "must be a string, a list of strings or a list of token ids")
