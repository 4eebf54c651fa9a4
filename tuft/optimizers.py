"""What a step may ask of a run's optimizer: the service checks it before it queues, the engine before it computes."""

from __future__ import annotations

import math
from dataclasses import fields

from tuft.errors import InvalidInput
from tuft.types import AdamParams, Optimizer, OptimizerParams

_PARAMS = {"adamw": "adam_params", "dimuon": "optimizer_params"}
"""Where the wire has a family's params."""


def check_step(params: OptimizerParams, optimizer: Optimizer) -> None:
    """Raises InvalidInput for params of another family than ``optimizer``, or that cannot be honoured."""
    where = _PARAMS[params.family]
    if params.family != optimizer:
        allowed = f"the run's optimizer is {optimizer!r} for as long as it lives: give params of that family"
        raise InvalidInput(where, params.family, allowed)
    of_any_sign = () if isinstance(params, AdamParams) else ("grad_clip_norm", "rank_lr_correction_exponent")
    for field in fields(params):
        value = getattr(params, field.name)
        if not math.isfinite(value) or (value < 0 and field.name not in of_any_sign):
            allowed = "must be finite" if field.name in of_any_sign else "must be finite and not negative"
            raise InvalidInput(f"{where}.{field.name}", value, allowed)
        if field.name in ("beta1", "beta2") and value >= 1:
            raise InvalidInput(f"{where}.{field.name}", value, "must be below 1")
        if field.name == "damping" and value == 0:
            raise InvalidInput(f"{where}.{field.name}", value, "must be above 0")
