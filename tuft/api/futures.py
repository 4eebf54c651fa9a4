"""Results that clients come back for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from tuft.api import results
from tuft.api.auth import Caller, Served
from tuft.api.body import Fields, off_loop, parse, read_body
from tuft.service.futures import Pending
from tuft.types import Failure, LossResult, SampleResult

router = APIRouter(tags=["futures"])


class RetrieveFuture(Fields):
    request_id: str


@router.post("/retrieve_future")
async def retrieve_future(request: Request, tenant: Caller, services: Served) -> Response:
    """Held while the work is under way: the client polls again without a pause. A failed operation is a result too."""
    request_id = parse(RetrieveFuture, await read_body(request)).request_id
    settled = await services.futures.wait(tenant, request_id, services.config.server.long_poll_s)
    if isinstance(settled, Pending):
        return JSONResponse(_try_again(request_id, settled), status_code=408)
    if isinstance(settled, Failure):
        return JSONResponse({"error": settled.message, "category": settled.category})
    num_bytes = _size_bytes(settled) if isinstance(settled, LossResult | SampleResult) else 0
    if isinstance(settled, LossResult | SampleResult) and results.PROTOBUF in request.headers.get("accept", ""):
        return Response(await off_loop(num_bytes, results.encode_proto, settled), media_type=results.PROTOBUF)
    return Response(await off_loop(num_bytes, results.encode_json, settled), media_type="application/json")


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
    arrays = [result.prompt_logprobs_P, result.topk_prompt_ids_PK, result.topk_prompt_logprobs_PK]
    return sum(array.nbytes for array in arrays if array is not None) + sum(
        sequence.tokens_N.nbytes + sequence.logprobs_N.nbytes for sequence in result.sequences
    )
