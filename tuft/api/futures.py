"""Results that clients come back for."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from tuft.api import results
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, JsonBody, off_loop
from tuft.records import SamplingClient
from tuft.service.futures import Pending
from tuft.types import Failure, Float32Array, FutureResult, LossResult, Matrix, SampleResult, TokenLogprobs

router = APIRouter(tags=["futures"])

_LONGEST_POLL_S = 30.0
"""The SDK gives up a retrieve_futures after 45 s."""


class OneFuture(Fields):
    request_id: str


class SamplingTarget(Fields):
    """A client of a sampling session."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: ClientSeq = 0


class RetrieveFutures(Fields):
    holds_data = True
    target: SamplingTarget
    prev_cursor: ClientSeq = 0
    timeout: float | None = Field(default=None, ge=0)
    retrieved_request_ids: tuple[str, ...] = Field((), max_length=100_000, fail_fast=True)


@router.post("/retrieve_future")
async def retrieve_future(body: JsonBody[OneFuture], request: Request, tenant: Caller, services: Served) -> Response:
    """Held while the work is under way: the client polls again without a pause. A failed operation is a result too."""
    request_id = body.request_id
    settled = await services.futures.wait(tenant, request_id, services.config.server.long_poll_s)
    if isinstance(settled, Pending):
        return JSONResponse(_try_again(request_id, settled), status_code=408)
    if isinstance(settled, Failure):
        return JSONResponse({"error": settled.message, "category": settled.category})
    num_bytes = _size_bytes(settled) if isinstance(settled, LossResult | SampleResult) else 0
    if isinstance(settled, LossResult | SampleResult) and results.PROTOBUF in request.headers.get("accept", ""):
        return Response(await off_loop(num_bytes, results.encode_proto, settled), media_type=results.PROTOBUF)
    return Response(await off_loop(num_bytes, results.encode_json, settled), media_type="application/json")


@router.post("/retrieve_futures")
async def retrieve_futures(body: JsonBody[RetrieveFutures], tenant: Caller, services: Served) -> dict[str, Any]:
    """Which samples of one client have ended since ``prev_cursor``: it fetches each result by its own retrieve_future,
    which then need not be held."""
    sampler = services.samplers.get(tenant, body.target.sampling_session_id)
    client = SamplingClient(sampler.sampler_id, body.target.cloned_sampler_id)
    services.completions.free(client, body.retrieved_request_ids)
    longest_s = min(services.config.server.long_poll_s, _LONGEST_POLL_S)
    hold_s = longest_s if body.timeout is None else min(body.timeout, longest_s)
    request_ids, cursor = await services.completions.poll(client, body.prev_cursor, hold_s)
    completions = [_completion(request_id, services.futures.peek(request_id)) for request_id in request_ids]
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future")
async def cancel_future(body: JsonBody[OneFuture], tenant: Caller, services: Served) -> dict[str, Any]:
    """The work ends; its future fails, unless it has been settled."""
    services.futures.cancel(tenant, body.request_id)
    return {}


def _completion(request_id: str, result: FutureResult | Failure | None) -> dict[str, Any]:
    """Without a result, the client is to ask for it: it then learns that there is none."""
    if not isinstance(result, LossResult | SampleResult):
        return {"state": "failed", "request_id": request_id}
    return {
        "state": "finished",
        "request_id": request_id,
        "response_payload_uncompressed_size": _size_bytes(result),
    }


def _try_again(request_id: str, pending: Pending) -> dict[str, Any]:
    return {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": pending.state,
        "queue_state_reason": pending.reason,
    }


def _size_bytes(result: LossResult | SampleResult) -> int:
    if isinstance(result, LossResult):
        return sum(logprobs.nbytes for logprobs in result.logprobs)
    arrays: list[Float32Array | TokenLogprobs | Matrix | None] = [
        result.prompt_logprobs_P,
        result.topk_prompt,
        result.target_prompt_logprobs,
        result.prompt_alternatives,
        *(sequence.topk for sequence in result.sequences),
    ]
    return sum(array.nbytes for array in arrays if array is not None) + sum(
        sequence.tokens_N.nbytes + sequence.logprobs_N.nbytes for sequence in result.sequences
    )
