"""Optimizers on the wire: the family that a run is created with, and the params of a step, which are of one family."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from tuft.api.body import Fields, parse
from tuft.api.shapes import OPTIMIZER_PARAMS
from tuft.errors import InvalidInput
from tuft.types import AdamParams, DimuonParams, Optimizer, OptimizerParams

_VERSION = 1  # of dimuon; the API numbers no other family's


class OptimizerConfig(Fields):
    type: str = "adamw"
    version: int = _VERSION

    @property
    def family(self) -> Optimizer:
        """Raises InvalidInput for a family or a version that this server does not compute."""
        family = _family(self.type, "optimizer_config.type")
        if family == "dimuon" and self.version != _VERSION:
            raise InvalidInput("optimizer_config.version", self.version, f"must be {_VERSION}")
        return family


def config_json(optimizer: Optimizer) -> dict[str, Any]:
    return {"type": optimizer, "version": _VERSION} if optimizer == "dimuon" else {"type": optimizer}


class ParamsType(Fields):
    type: str


class OptimStep(Fields):
    adam_params: AdamParams | None = None
    optimizer_params: Annotated[ParamsType | None, OPTIMIZER_PARAMS] = None


class AdamStep(Fields):
    optimizer_params: AdamParams


class DimuonStep(Fields):
    optimizer_params: DimuonParams


def step_params(content: bytes) -> OptimizerParams:
    """What an optim_step asks for. Raises InvalidInput."""
    step = parse(OptimStep, content)
    if step.optimizer_params is None:
        if step.adam_params is None:
            raise InvalidInput("adam_params", None, "is required, or optimizer_params")
        return step.adam_params
    if step.adam_params is not None:
        raise InvalidInput("optimizer_params", step.optimizer_params.type, "must be absent if there are adam_params")
    if _family(step.optimizer_params.type, "optimizer_params.type") == "dimuon":
        return parse(DimuonStep, content).optimizer_params
    return parse(AdamStep, content).optimizer_params


def _family(name: str, field: str) -> Optimizer:
    families: tuple[Optimizer, ...] = get_args(Optimizer)
    for family in families:
        if family == name:
            return family
    raise InvalidInput(field, name, f"must be {' or '.join(map(repr, families))}")
