"""What each loss reads of an operation, and whether the operation has it: the service checks before it queues, the
engine before it computes. ``engine.losses`` holds the formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tuft.errors import InvalidInput
from tuft.tokens import TokenBounds, check_ids, check_tokens, first_of
from tuft.types import Datum

_LOW, _HIGH = "clip_low_threshold", "clip_high_threshold"
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class LossSignature:
    """``inputs``: what every datum carries beside ``target_tokens``; all have the targets' shape.

    ``optional``: what a datum may carry too, and the number that else stands for each of its elements (None: the loss
    then makes do without). ``config``: the keys of ``loss_fn_config`` and their defaults; where a datum carries an
    input of such a name, its elements hold instead.
    """

    inputs: tuple[str, ...] = ()
    optional: Mapping[str, float | None] = field(default_factory=dict)
    config: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, *self.optional, *self.config)


_POLICY = ("logprobs", "advantages")
LOSS_SIGNATURES: Mapping[str, LossSignature] = {
    "cross_entropy": LossSignature(optional={"weights": 1.0}),
    "importance_sampling": LossSignature(_POLICY),
    "ppo": LossSignature(_POLICY, config={_LOW: 0.8, _HIGH: 1.2}),
    "cispo": LossSignature(_POLICY, config={_LOW: 0.0, _HIGH: 4.0}),
    "dro": LossSignature(_POLICY, config={"beta": 0.05}),
    "gspo": LossSignature(_POLICY, optional={"sequence_ratio_mask": None}, config={_LOW: 0.8, _HIGH: 1.2}),
    "stable_reinforce": LossSignature(
        ("advantages",), optional={"logprobs": 0.0, "is_sampled": 0.0}, config={"kl_coeff": 0.002}
    ),
}
"""Defaults are Tinker's, but for ``beta``, which its documentation gives as an example only, gspo's thresholds, of
which it does not tell: they are ppo's, and ``kl_coeff`` (docs/adr/0013). The optional inputs of ``stable_reinforce``
are filled in by ``service.provenance`` from what was recorded."""

LOSS_INPUTS = frozenset(
    {"target_tokens", "weights", "logprobs", "advantages", _LOW, _HIGH, "sequence_ratio_mask"},
)
"""Every input that the API knows. A datum may carry those of another loss, which are not read; a name beyond these is
an error."""


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A loss that a client wrote: the names of what it reads, ``logprobs`` first, each with its rank (0, 1 or 2), and
    the JSON of its graph's nodes as the client sent them."""

    name: str
    inputs: tuple[tuple[str, int], ...]
    nodes: str


def check_loss(
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float | str],
    model: TokenBounds,
    numbers: Sequence[int] | None = None,
    custom: CustomLoss | None = None,
) -> None:
    """Raises InvalidInput that names the field, and the datum by its place (by ``numbers``, if given):
    ``data[3].loss_fn_inputs.weights[5]``. ``custom``: the loss that the loss_id of ``loss_fn_config`` names."""
    signature = LOSS_SIGNATURES.get(loss_fn)
    if custom is not None:
        signature = LossSignature(tuple(name for name, _ in custom.inputs[1:]))
    elif signature is not None:
        _check_config(loss_fn, signature, loss_fn_config)
    else:
        known = ", ".join(sorted([*LOSS_SIGNATURES, "custom"]))
        raise InvalidInput("loss_fn", loss_fn, f"this server computes {known}")
    if not data:
        raise InvalidInput("data", [], "must hold at least one datum")
    for number, datum in zip(range(len(data)) if numbers is None else numbers, data, strict=True):
        where = f"data[{number}]"
        check_tokens(datum.tokens_T, f"{where}.model_input", model)
        for name in ("target_tokens", *signature.inputs):
            if name not in datum.loss_fn_inputs:
                raise InvalidInput(f"{where}.loss_fn_inputs", sorted(datum.loss_fn_inputs), f"{loss_fn} needs {name}")
        _check_targets(datum, f"{where}.loss_fn_inputs.target_tokens", model)
        if custom is not None:
            _check_custom_inputs(datum, f"{where}.loss_fn_inputs", custom)
        else:
            _check_inputs(datum, f"{where}.loss_fn_inputs", signature)
        if _LOW in signature.config:
            _check_clipping(datum, f"{where}.loss_fn_inputs", loss_fn, {**signature.config, **loss_fn_config})
        if loss_fn == "gspo":
            _check_ratio_mask(datum, f"{where}.loss_fn_inputs.sequence_ratio_mask")


def _check_config(loss_fn: str, signature: LossSignature, config: Mapping[str, float | str]) -> None:
    for key, value in config.items():
        if key not in signature.config:
            allowed = ", ".join(sorted(signature.config)) or "no option at all"
            raise InvalidInput("loss_fn_config", key, f"{loss_fn} takes {allowed}")
        if isinstance(value, str) or not -_LARGEST <= value <= _LARGEST:
            raise InvalidInput(f"loss_fn_config.{key}", value, "must be a finite number")
        if key in ("beta", "kl_coeff") and value < 0:
            raise InvalidInput(f"loss_fn_config.{key}", value, "must not be negative")


def _check_targets(datum: Datum, where: str, model: TokenBounds) -> None:
    targets = datum.loss_fn_inputs["target_tokens"]
    num_tokens = datum.num_tokens
    if targets.ndim not in (1, 2) or len(targets) != num_tokens or targets.size == 0:
        allowed = f"must be [{num_tokens}] or [{num_tokens}, K], a row for each input token"
        raise InvalidInput(where, f"shape {list(targets.shape)}", allowed)
    if targets.size > num_tokens * model.vocab_size:
        allowed = f"must have at most {model.vocab_size} columns, the vocabulary of {model.name}"
        raise InvalidInput(where, f"shape {list(targets.shape)}", allowed)
    check_ids(targets, where, model)


def _check_inputs(datum: Datum, where: str, signature: LossSignature) -> None:
    targets = datum.loss_fn_inputs["target_tokens"]
    for name, array in datum.loss_fn_inputs.items():
        if name not in LOSS_INPUTS and name not in (*signature.inputs, *signature.optional):
            raise InvalidInput(f"{where}.{name}", name, f"known inputs are {', '.join(sorted(LOSS_INPUTS))}")
        if name in signature.names:
            if array.shape != targets.shape:
                allowed = f"must be {list(targets.shape)}, that of target_tokens"
                raise InvalidInput(f"{where}.{name}", f"shape {list(array.shape)}", allowed)
            _check_numbers(array, f"{where}.{name}")


def _check_custom_inputs(datum: Datum, where: str, custom: CustomLoss) -> None:
    """Their ranks; their lengths are the loss's own affair. What it does not read may be anything."""
    for name, rank in (("target_tokens", custom.inputs[0][1]), *custom.inputs[1:]):
        array = datum.loss_fn_inputs[name]
        if array.ndim != rank and not (rank == 0 and array.size == 1):  # the wire has scalars as arrays of one
            allowed = f"{custom.name} was created for rank {rank}"
            raise InvalidInput(f"{where}.{name}", f"shape {list(array.shape)}", allowed)
        _check_numbers(array, f"{where}.{name}")


def _check_numbers(array: npt.NDArray[np.generic], where: str) -> None:
    if array.dtype.kind not in "fiu":
        raise InvalidInput(where, str(array.dtype), "must be numbers")
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(array.astype(np.float32, copy=False))
    if not is_finite.all():
        place, value = first_of(array, ~is_finite)
        raise InvalidInput(f"{where}{place}", value, "must be a finite number, of float32's range")


def _check_clipping(datum: Datum, where: str, loss_fn: str, config: Mapping[str, float | str]) -> None:
    """The thresholds are bounds of the ratio itself, which is 1 on policy, and not distances from 1."""
    low, high = (np.asarray(datum.loss_fn_inputs.get(name, config[name])) for name in (_LOW, _HIGH))
    for name, is_wrong, allowed in (
        (_LOW, low > high, f"must be at most {_HIGH}, everywhere"),
        (_LOW, (low > 1) & (loss_fn == "gspo"), "bounds the ratio: must be at most 1, e.g. 0.9997"),
        (_HIGH, (high < 1) & (loss_fn == "gspo"), "bounds the ratio: must be at least 1, e.g. 1.0004"),
    ):
        if is_wrong.any() and name in datum.loss_fn_inputs:
            place, value = first_of(datum.loss_fn_inputs[name], is_wrong)
            raise InvalidInput(f"{where}.{name}{place}", value, allowed)
        if is_wrong.any():
            raise InvalidInput(f"loss_fn_config.{name}", config[name], allowed)


def _check_ratio_mask(datum: Datum, where: str) -> None:
    mask = datum.loss_fn_inputs.get("sequence_ratio_mask")
    if mask is not None and not mask.any() and datum.loss_fn_inputs["advantages"].any():
        raise InvalidInput(where, "zeros only", "must mark the sampled tokens: their ratio is the sequence's")
