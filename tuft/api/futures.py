"""Results that clients come back for."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, ValidationInfo, field_validator

from tuft.api import results
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, JsonBody, check_count, limits_of, off_loop
from tuft.api.inflight import Bounded, HeldResponse
from tuft.config import LimitsSection
from tuft.records import Outcome, SamplingClient
from tuft.service.futures import Pending
from tuft.service.settlements import size_bytes
from tuft.turns import Turns
from tuft.types import Failure, LossResult, SampleResult

router = APIRouter(tags=["futures"])

_LONGEST_POLL_S = 30.0
"""The SDK gives up a retrieve_futures after 45 s."""
_JSON_BYTES_OF_ONE = 5
"""A float of 4 bytes has up to 20 digits and signs."""
_ID_BYTES = 64
"""Of a request id in a list, and more than that."""


class OneFuture(Fields):
    request_id: str


class SamplingTarget(Fields):
    """A client of a sampling session."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: ClientSeq = 0


class RetrieveFutures(Fields):
    target: SamplingTarget
    prev_cursor: ClientSeq = 0
    timeout: float | None = Field(default=None, ge=0)
    retrieved_request_ids: tuple[str, ...] = Field((), fail_fast=True)

    @classmethod
    def limit_bytes(cls, limits: LimitsSection) -> tuple[int, str]:
        return max(super().limit_bytes(limits), (limits.max_listed_ids * _ID_BYTES, "limits.max_listed_ids"))

    @field_validator("retrieved_request_ids")
    @classmethod
    def _are_few(cls, request_ids: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        check_count(request_ids, "retrieved_request_ids", limits_of(info), "max_listed_ids")
        return request_ids


@router.post("/retrieve_future")
async def retrieve_future(
    body: JsonBody[OneFuture], request: Request, tenant: Caller, services: Served, inflight: Bounded
) -> Response:
    """Held while the work is under way: the client polls again without a pause. A failed operation is a result too."""
    request_id = body.request_id
    settled = await services.futures.wait(tenant, request_id, services.config.server.long_poll_s)
    turns: Turns = request.app.state.turns
    await turns.turn()  # a pass may settle hundreds at once
    if isinstance(settled, Pending):
        return JSONResponse(_try_again(request_id, settled), status_code=408)
    if isinstance(settled, Failure):
        return JSONResponse({"error": settled.message, "category": settled.category})
    num_bytes = size_bytes(settled)
    accepted = request.headers.get("accept", "")
    as_protobuf = isinstance(settled, LossResult | SampleResult) and results.PROTOBUF in accepted
    hold = await inflight.take(tenant.tenant_id, num_bytes * (1 if as_protobuf else _JSON_BYTES_OF_ONE))
    try:
        if isinstance(settled, LossResult | SampleResult) and as_protobuf:
            return HeldResponse(await off_loop(num_bytes, results.encode_proto, settled), hold, results.PROTOBUF)
        return HeldResponse(await off_loop(num_bytes, results.encode_json, settled), hold, "application/json")
    except BaseException:  # whatever it was: it goes on, and what was held does not stay held
        hold.release()
        raise


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
    completions = [_completion(request_id, services.futures.ended(request_id)) for request_id in request_ids]
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future")
async def cancel_future(body: JsonBody[OneFuture], tenant: Caller, services: Served) -> dict[str, Any]:
    """The work ends; its future fails, unless it has been settled."""
    services.futures.cancel(tenant, body.request_id)
    return {}


def _completion(request_id: str, ended: tuple[Outcome, int] | None) -> dict[str, Any]:
    """Without a result, the client is to ask for it: it then learns why there is none."""
    if ended is None or ended[0] == "failed":
        return {"state": "failed", "request_id": request_id}
    return {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": ended[1]}


def _try_again(request_id: str, pending: Pending) -> dict[str, Any]:
    return {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": pending.state,
        "queue_state_reason": pending.reason,
    }
