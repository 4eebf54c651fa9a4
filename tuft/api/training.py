"""Training runs and their loop: every call answers at once with the id of a future."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, ValidationInfo, field_validator

from tuft.api import wire
from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, JsonBody, Name, RawBody, Sent, check_count, limits_of, off_loop, texts
from tuft.api.optimizers import OptimizerConfig, OptimStep, config_json, step_params
from tuft.api.results import PROTOBUF
from tuft.api.shapes import LossInput
from tuft.api.wire import MAX_SEQ_ID, LossRequest
from tuft.errors import InvalidInput, TooLarge
from tuft.records import Tenant
from tuft.service.services import Services
from tuft.types import LoraSpec, Optimizer

router = APIRouter(tags=["training"])


_OUR_OBJECTIVE = (
    "no deprecation, but a note on loss_fn='stable_reinforce': Tinker does not publish its objective, so this server "
    "computes one of its own (truncated ratios in a trust region, docs/adr/0013); results may differ from Tinker's"
)


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


class ForwardBackward(Envelope):
    holds_data = True
    is_protobuf_too = True

    forward_backward_input: LossInput = None


class Forward(Envelope):
    holds_data = True

    forward_input: LossInput = None


class Step(Envelope, OptimStep):
    pass


class SaveWeights(Envelope):
    path: Name | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Envelope):
    path: Name | None = None
    sampling_session_seq_id: ClientSeq | None = None
    kind: str = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None


class SaveWeightsExternal(Envelope):
    path: Name
    ttl_seconds: int | None = None
    age_encryption_recipients: tuple[str, ...] | None = Field(None, fail_fast=True)

    @field_validator("age_encryption_recipients")
    @classmethod
    def _are_few(cls, recipients: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        check_count(recipients or (), "age_encryption_recipients", limits_of(info), "max_recipients")
        return recipients


class LoadFields(Fields):
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None

    @property
    def family(self) -> Optimizer | None:
        return None if self.optimizer_config is None else self.optimizer_config.family


class LoadWeights(LoadFields, Envelope):
    """Into a run."""


class CreateFromWeights(LoadFields):
    """Into a new one."""

    session_id: str
    model_seq_id: ClientSeq
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None


class LoadShape(Fields):
    """Tells the two requests of load_weights apart: on a live run, or creating one."""

    one_of = (LoadWeights, CreateFromWeights)

    model_id: str | None = None


@router.post("/create_model")
async def create_model(body: JsonBody[CreateModel], tenant: Caller, services: Served) -> dict[str, Any]:
    optimizer = body.optimizer_config.family if body.optimizer_config else "adamw"
    spec = body.lora_config or LoraSpec()
    request_id = await services.runs.create(
        tenant,
        body.session_id,
        body.model_seq_id,
        body.base_model,
        spec,
        texts(body.user_metadata, services.config.limits),
        optimizer,
    )
    return {"request_id": request_id}


@router.post("/get_info")
async def get_info(body: JsonBody[OnRun], request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """The SDK asks this when it creates a training client, and where the run's tokenizer is to be had."""
    run = services.runs.get(tenant, body.model_id)
    model = services.models.require(run.base_model)
    tokenizer_id = model.tokenizer_dir if is_loopback(request) else model.name
    return {
        "type": "get_info",
        "model_id": run.run_id,
        "model_name": run.base_model,
        "model_data": {"arch": model.architecture, "model_name": run.base_model, "tokenizer_id": tokenizer_id},
        "is_lora": True,
        "lora_rank": run.spec.rank,
        "optimizer_config": config_json(run.optimizer),
    }


@router.post("/unload_model")
async def unload_model(body: JsonBody[OnRun], tenant: Caller, services: Served) -> dict[str, Any]:
    return {"request_id": await services.runs.unload(tenant, body.model_id), "model_id": body.model_id}


@router.post("/forward_backward")
async def forward_backward(
    sent: RawBody[ForwardBackward], request: Request, response: Response, tenant: Caller, services: Served
) -> dict[str, Any]:
    """Protobuf, as every SDK since 0.25 sends it, or the older JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != PROTOBUF:
        return await _loss_in_json(sent, tenant, services, "forward_backward_input", backward=True)
    limits = services.config.limits
    run_id, seq_id = wire.scan_envelope(sent.content)
    try:
        if sent.oversize is not None:
            raise sent.oversize
        loss = await off_loop(len(sent.content), wire.decode_loss_request, sent.content, limits)
    except (InvalidInput, TooLarge) as error:
        return _accepted(run_id, await services.operations.reject(tenant, run_id, seq_id, error))
    if loss.loss_fn == "stable_reinforce" and services.provenance.is_news_to(run_id):
        response.headers["x-deprecation-note"] = _OUR_OBJECTIVE  # the header whose text the SDK logs
    return _accepted(run_id, await _submit_loss(services, tenant, run_id, seq_id, loss))


@router.post("/forward")
async def forward(sent: RawBody[Forward], tenant: Caller, services: Served) -> dict[str, Any]:
    """JSON only: SDKs since 0.25 send ``forward_only`` to forward_backward instead."""
    return await _loss_in_json(sent, tenant, services, "forward_input", backward=False)


@router.post("/optim_step")
async def optim_step(sent: RawBody[Step], tenant: Caller, services: Served) -> dict[str, Any]:
    async def submit(run_id: str, seq_id: int) -> str:
        return await services.operations.optim_step(tenant, run_id, seq_id, step_params(sent.content))

    return await _submit(services, tenant, sent, submit)


@router.post("/save_weights")
async def save_weights(sent: RawBody[SaveWeights], tenant: Caller, services: Served) -> dict[str, Any]:
    async def submit(run_id: str, seq_id: int) -> str:
        body = sent.parse()
        metadata = texts(body.user_metadata, sent.limits)
        return await services.operations.save_weights(
            tenant, run_id, seq_id, body.path, body.ttl_seconds, body.overwrite, metadata
        )

    return await _submit(services, tenant, sent, submit)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    sent: RawBody[SaveWeightsForSampler], tenant: Caller, services: Served
) -> dict[str, Any]:
    """With ``path``, a named checkpoint; without, a sampling session on weights that nothing else names."""

    async def submit(run_id: str, seq_id: int) -> str:
        body = sent.parse()
        metadata = texts(body.user_metadata, sent.limits)
        return await services.operations.save_weights_for_sampler(
            tenant, run_id, seq_id, body.path, body.sampling_session_seq_id, body.ttl_seconds, metadata, body.kind
        )

    return await _submit(services, tenant, sent, submit)


@router.post("/save_weights_external")
async def save_weights_external(sent: RawBody[SaveWeightsExternal], tenant: Caller, services: Served) -> dict[str, Any]:
    async def submit(run_id: str, seq_id: int) -> str:
        body = sent.parse()
        return await services.operations.save_weights_external(
            tenant, run_id, seq_id, body.path, body.ttl_seconds, body.age_encryption_recipients
        )

    return await _submit(services, tenant, sent, submit)


@router.post("/load_weights")
async def load_weights(sent: RawBody[LoadShape], tenant: Caller, services: Served) -> dict[str, Any]:
    if sent.parse_as(LoadShape).model_id is None:
        created = sent.parse_as(CreateFromWeights)
        request_id = await services.runs.create_from_checkpoint(
            tenant,
            created.session_id,
            created.model_seq_id,
            created.path,
            created.optimizer,
            created.base_model,
            texts(created.user_metadata, sent.limits),
            created.weights_access_token,
            created.family,
        )
        return {"request_id": request_id}

    async def submit(run_id: str, seq_id: int) -> str:
        body = sent.parse_as(LoadWeights)
        return await services.operations.load_weights(
            tenant, run_id, seq_id, body.path, body.optimizer, body.weights_access_token, body.family
        )

    return await _submit(services, tenant, sent, submit)


async def _loss_in_json(
    sent: Sent[ForwardBackward] | Sent[Forward], tenant: Tenant, services: Services, field: str, *, backward: bool
) -> dict[str, Any]:
    envelope = await off_loop(len(sent.content), sent.parse)

    def decode() -> LossRequest:
        return wire.decode_loss_request_json(getattr(envelope, field), sent.limits, backward=backward, field=field)

    try:
        loss = await off_loop(len(sent.content), decode)
    except (InvalidInput, TooLarge) as error:
        request_id = await services.operations.reject(tenant, envelope.model_id, envelope.seq_id, error)
    else:
        request_id = await _submit_loss(services, tenant, envelope.model_id, envelope.seq_id, loss)
    return _accepted(envelope.model_id, request_id)


async def _submit_loss(services: Services, tenant: Tenant, run_id: str, seq_id: int, loss: LossRequest) -> str:
    return await services.operations.forward_backward(
        tenant, run_id, seq_id, loss.data, loss.loss_fn, loss.loss_fn_config, loss.backward
    )


async def _submit(
    services: Services, tenant: Tenant, sent: Sent[Any], submit: Callable[[str, int], Awaitable[str]]
) -> dict[str, Any]:
    """``submit(run_id, seq_id)`` decodes the payload and queues it; if the payload is wrong, its seq is consumed by a
    future that says so."""
    envelope = sent.parse_as(Envelope)
    try:
        request_id = await submit(envelope.model_id, envelope.seq_id)
    except InvalidInput as error:
        request_id = await services.operations.reject(tenant, envelope.model_id, envelope.seq_id, error)
    return _accepted(envelope.model_id, request_id)


def _accepted(run_id: str, request_id: str) -> dict[str, Any]:
    return {"request_id": request_id, "model_id": run_id}


def is_loopback(request: Request) -> bool:
    """A client on this machine can read the tokenizer's directory itself."""
    if request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:  # a name, as a test client or a Unix socket has it
        return False
