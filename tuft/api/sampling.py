"""Sampling sessions and samples."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from tuft.api import shapes, tensors, wire
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, JsonBody, RawBody, Sent, off_loop
from tuft.errors import InvalidInput
from tuft.types import Matrix, PromptScoring, SampleSpec, SamplingParams

router = APIRouter(tags=["sampling"])

Stop = tuple[str, ...] | tuple[int, ...] | None


class CreateSamplingSession(Fields):
    session_id: str
    sampling_session_seq_id: ClientSeq
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Fields):
    sampling_session_id: str


class SamplingFields(Fields):
    """As ``SamplingParams``, with every way to write ``stop``."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: shapes.Stop = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Fields):
    """Of a sampling session or, in a single request that is no part of any, of a base model or saved weights."""

    holds_data = True
    sampling_session_id: str | None = None
    seq_id: ClientSeq | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt: shapes.Prompt
    sampling_params: SamplingFields = SamplingFields()
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: shapes.AnyTensor = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: JsonBody[CreateSamplingSession], tenant: Caller, services: Served
) -> dict[str, Any]:
    sampler = services.samplers.create(
        tenant, body.session_id, body.sampling_session_seq_id, body.base_model, body.model_path
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}


@router.post("/join_sampling_session")
async def join_sampling_session(
    body: JsonBody[JoinSamplingSession], tenant: Caller, services: Served
) -> dict[str, Any]:
    """A copy of a client, in another process, asks which samples are its own to number."""
    number = services.samplers.join(tenant, body.sampling_session_id)
    return {"type": "join_sampling_session", "client_counter": number}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, tenant: Caller, services: Served) -> dict[str, Any]:
    sampler = services.samplers.get(tenant, sampler_id)
    return {"sampler_id": sampler.sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/asample")
async def asample(sent: RawBody[Sample], tenant: Caller, services: Served) -> dict[str, Any]:
    """Samples need no order, so a wrong request is refused here and now."""
    body, spec = await off_loop(len(sent.content), _decode, sent)
    sampler_id, seq_id = body.sampling_session_id, body.seq_id
    if sampler_id is None:
        session = services.sessions.create(tenant, (), {}, "", None)
        sampler = services.samplers.create(tenant, session.session_id, 0, body.base_model, body.model_path)
        sampler_id, seq_id = sampler.sampler_id, 0
    if seq_id is None:
        raise InvalidInput("seq_id", None, "is required")
    request_id, sequence_ids = await services.samplers.sample(
        tenant, sampler_id, seq_id, spec, bool(body.record_stability_info)
    )
    return {"request_id": request_id, "sample_sequence_ids": sequence_ids}


def _decode(sent: Sent[Sample]) -> tuple[Sample, SampleSpec]:
    body = sent.parse()
    asked = body.sampling_params
    spec = SampleSpec(
        prompt_tokens=tuple(wire.prompt_tokens_json(body.prompt, "prompt", sent.limits).tolist()),
        params=SamplingParams(
            max_tokens=asked.max_tokens,
            seed=asked.seed,
            stop=_stop(asked.stop),
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
        ),
        num_samples=body.num_samples,
        topk_logprobs=body.topk_sample_logprobs,
        scoring=PromptScoring(
            logprobs=bool(body.prompt_logprobs),
            topk=body.topk_prompt_logprobs,
            last_n=body.prompt_logprobs_last_n,
            targets=_targets(body.target_prompt_logprobs),
            num_alternatives=body.prompt_alt_tokens_k,
        ),
    )
    return body, spec


def _targets(tensor: object) -> Matrix | None:
    if tensor is None:
        return None
    field = "target_prompt_logprobs"
    found = tensors.from_json(tensor, field)
    if len(found.shape) != 2:
        raise InvalidInput(f"{field}.shape", list(found.shape), "must be [prompt tokens - 1, K]")
    num_rows, num_columns = found.shape
    return Matrix(found.values, (num_rows, num_columns), found.crow, found.col)


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
