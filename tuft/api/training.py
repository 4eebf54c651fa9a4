"""Training runs and their loop: every call answers at once with the id of a future."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field

from tuft.api import wire
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, load_json, off_loop, parse, read_body, read_bounded, texts
from tuft.api.results import PROTOBUF
from tuft.api.wire import MAX_SEQ_ID, NOT_SUPPORTED, LossRequest
from tuft.errors import InvalidInput, TooLarge
from tuft.records import Tenant
from tuft.service.services import Services
from tuft.types import AdamParams, LoraSpec

router = APIRouter(tags=["training"])


class OptimizerConfig(Fields):
    type: str = "adamw"


class CreateModel(Fields):
    session_id: str
    model_seq_id: ClientSeq
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraSpec | None = None
    optimizer_config: OptimizerConfig | None = None


class OnRun(Fields):
    model_id: str


class Envelope(Fields):
    """What every operation of a run carries. Once these two are known, whatever else is wrong fails through a future:
    the client counts on from ``seq_id`` and a hole would stop its run."""

    model_id: str
    seq_id: int = Field(ge=1, le=MAX_SEQ_ID)


class OptimStep(Fields):
    adam_params: AdamParams | None = None
    optimizer_params: OptimizerConfig | None = None


class SaveWeights(Fields):
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Fields):
    path: str | None = None
    sampling_session_seq_id: ClientSeq | None = None
    kind: str = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None


class LoadWeights(Fields):
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


L = TypeVar("L", bound=LoadWeights)


class CreateFromWeights(LoadWeights):
    session_id: str
    model_seq_id: ClientSeq
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None


class LoadShape(Fields):
    """Tells the two requests of load_weights apart: on a live run, or creating one."""

    model_id: str | None = None


@router.post("/create_model")
async def create_model(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    body = parse(CreateModel, await read_body(request))
    _refuse_other_optimizers(body.optimizer_config, "optimizer_config")
    spec = body.lora_config or LoraSpec()
    request_id = services.runs.create(
        tenant, body.session_id, body.model_seq_id, body.base_model, spec, texts(body.user_metadata)
    )
    return {"request_id": request_id}


@router.post("/get_info")
async def get_info(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """The SDK asks this when it creates a training client, and where the run's tokenizer is to be had."""
    run = services.runs.get(tenant, parse(OnRun, await read_body(request)).model_id)
    model = services.models.require(run.base_model)
    tokenizer_id = model.tokenizer_dir if is_loopback(request) else model.name
    return {
        "type": "get_info",
        "model_id": run.run_id,
        "model_name": run.base_model,
        "model_data": {"arch": model.architecture, "model_name": run.base_model, "tokenizer_id": tokenizer_id},
        "is_lora": True,
        "lora_rank": run.spec.rank,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/unload_model")
async def unload_model(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    run_id = parse(OnRun, await read_body(request)).model_id
    return {"request_id": services.runs.unload(tenant, run_id), "model_id": run_id}


@router.post("/forward_backward")
async def forward_backward(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """Protobuf, as every SDK since 0.25 sends it, or the older JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != PROTOBUF:
        return await _loss_in_json(request, tenant, services, "forward_backward_input", backward=True)
    limit_bytes = services.config.limits.max_request_bytes
    content, oversize = await read_bounded(request, limit_bytes)
    run_id, seq_id = wire.scan_envelope(content)
    try:
        if oversize is not None:
            raise oversize
        loss = await off_loop(len(content), wire.decode_loss_request, content, limit_bytes)
    except (InvalidInput, TooLarge) as error:
        return _accepted(run_id, services.operations.reject(tenant, run_id, seq_id, error))
    return _accepted(run_id, _submit_loss(services, tenant, run_id, seq_id, loss))


@router.post("/forward")
async def forward(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """JSON only: SDKs since 0.25 send ``forward_only`` to forward_backward instead."""
    return await _loss_in_json(request, tenant, services, "forward_input", backward=False)


@router.post("/optim_step")
async def optim_step(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    content = await read_body(request)

    def submit(run_id: str, seq_id: int) -> str:
        body = parse(OptimStep, content)
        _refuse_other_optimizers(body.optimizer_params, "optimizer_params")
        if body.adam_params is None:
            raise InvalidInput("adam_params", None, "is required")
        return services.operations.optim_step(tenant, run_id, seq_id, body.adam_params)

    return _submit(services, tenant, content, submit)


@router.post("/save_weights")
async def save_weights(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    content = await read_body(request)

    def submit(run_id: str, seq_id: int) -> str:
        body = parse(SaveWeights, content)
        metadata = texts(body.user_metadata)
        return services.operations.save_weights(
            tenant, run_id, seq_id, body.path, body.ttl_seconds, body.overwrite, metadata
        )

    return _submit(services, tenant, content, submit)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """With ``path``, a named checkpoint; without, a sampling session on weights that nothing else names."""
    content = await read_body(request)

    def submit(run_id: str, seq_id: int) -> str:
        body = parse(SaveWeightsForSampler, content)
        if body.kind != "snapshot":
            raise InvalidInput("kind", body.kind, f"{NOT_SUPPORTED}; must be 'snapshot'")
        metadata = texts(body.user_metadata)
        return services.operations.save_weights_for_sampler(
            tenant, run_id, seq_id, body.path, body.sampling_session_seq_id, body.ttl_seconds, metadata
        )

    return _submit(services, tenant, content, submit)


@router.post("/load_weights")
async def load_weights(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    content = await read_body(request)
    if parse(LoadShape, content).model_id is None:
        created = _loadable(parse(CreateFromWeights, content))
        request_id = services.runs.create_from_checkpoint(
            tenant,
            created.session_id,
            created.model_seq_id,
            created.path,
            created.optimizer,
            created.base_model,
            texts(created.user_metadata),
        )
        return {"request_id": request_id}

    def submit(run_id: str, seq_id: int) -> str:
        body = _loadable(parse(LoadWeights, content))
        return services.operations.load_weights(tenant, run_id, seq_id, body.path, body.optimizer)

    return _submit(services, tenant, content, submit)


async def _loss_in_json(
    request: Request, tenant: Tenant, services: Services, field: str, *, backward: bool
) -> dict[str, Any]:
    limit_bytes = services.config.limits.max_request_bytes
    content = await read_body(request, limit_bytes)
    envelope = await off_loop(len(content), parse, Envelope, content)

    def decode() -> LossRequest:
        return wire.decode_loss_request_json(load_json(content).get(field), limit_bytes, backward=backward, field=field)

    try:
        loss = await off_loop(len(content), decode)
    except (InvalidInput, TooLarge) as error:
        request_id = services.operations.reject(tenant, envelope.model_id, envelope.seq_id, error)
    else:
        request_id = _submit_loss(services, tenant, envelope.model_id, envelope.seq_id, loss)
    return _accepted(envelope.model_id, request_id)


def _submit_loss(services: Services, tenant: Tenant, run_id: str, seq_id: int, loss: LossRequest) -> str:
    return services.operations.forward_backward(
        tenant, run_id, seq_id, loss.data, loss.loss_fn, loss.loss_fn_config, loss.backward
    )


def _submit(services: Services, tenant: Tenant, content: bytes, submit: Callable[[str, int], str]) -> dict[str, Any]:
    """``submit(run_id, seq_id)`` decodes the payload and queues it; if the payload is wrong, its seq is consumed by a
    future that says so."""
    envelope = parse(Envelope, content)
    try:
        request_id = submit(envelope.model_id, envelope.seq_id)
    except InvalidInput as error:
        request_id = services.operations.reject(tenant, envelope.model_id, envelope.seq_id, error)
    return _accepted(envelope.model_id, request_id)


def _accepted(run_id: str, request_id: str) -> dict[str, Any]:
    return {"request_id": request_id, "model_id": run_id}


def _loadable(body: L) -> L:
    _refuse_other_optimizers(body.optimizer_config, "optimizer_config")
    if body.weights_access_token is not None:
        raise InvalidInput("weights_access_token", "a token", f"{NOT_SUPPORTED}; load your own checkpoints")
    return body


def _refuse_other_optimizers(config: OptimizerConfig | None, field: str) -> None:
    if config is not None and config.type != "adamw":
        raise InvalidInput(f"{field}.type", config.type, f"{NOT_SUPPORTED}; must be 'adamw'")


def is_loopback(request: Request) -> bool:
    """A client on this machine can read the tokenizer's directory itself."""
    if request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:  # a name, as a test client or a Unix socket has it
        return False
