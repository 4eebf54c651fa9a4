"""Losses that clients wrote with torch, which the SDK traces and sends as plain data."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, Name, RawBody, check_count
from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.losses import CustomLoss

router = APIRouter(tags=["training"])


class LossEnvelope(Fields):
    """Once these are known, whatever else is wrong fails through a future."""

    session_id: str
    custom_loss_seq_id: ClientSeq


class LossInput(Fields):
    name: str
    rank: int


class Graph(Fields):
    """The nodes are the engine's to read."""

    format: int = 1
    nodes: list[dict[str, Any]] = Field(fail_fast=True)


class CreateCustomLoss(LossEnvelope):
    name: Name = Field(min_length=1)
    inputs: list[LossInput] = Field(fail_fast=True)
    graph: Graph


@router.post("/create_custom_loss")
async def create_custom_loss(sent: RawBody[CreateCustomLoss], tenant: Caller, services: Served) -> dict[str, Any]:
    """Nothing of the graph is run here: the engine reads it, against its list of what a loss may do."""
    envelope = sent.parse_as(LossEnvelope)
    try:
        loss = _custom_loss(sent.parse(), sent.limits)
    except InvalidInput as error:
        request_id = await services.custom_losses.reject(
            tenant, envelope.session_id, envelope.custom_loss_seq_id, error
        )
    else:
        request_id = await services.custom_losses.create(tenant, envelope.session_id, envelope.custom_loss_seq_id, loss)
    return {"request_id": request_id}


def _custom_loss(body: CreateCustomLoss, limits: LimitsSection) -> CustomLoss:
    check_count(body.graph.nodes, "graph.nodes", limits, "max_loss_nodes")
    if body.graph.format != 1:
        raise InvalidInput("graph.format", body.graph.format, "must be 1, the only one this server reads")
    inputs = tuple((given.name, given.rank) for given in body.inputs)
    return CustomLoss(body.name, inputs, json.dumps(body.graph.nodes))
