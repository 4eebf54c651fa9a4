"""What a part's data must be before it may enter a pass that others share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tuft.engine.base import RunLoss
from tuft.engine.losses import LOSSES, Loss
from tuft.errors import InvalidInput
from tuft.models.architecture import DecoderConfig
from tuft.types import Datum


def check_part(part: RunLoss, config: DecoderConfig) -> None:
    """Raises InvalidInput that names the datum (by its place in the whole operation), the field, what it holds and what
    is allowed."""
    loss = LOSSES.get(part.loss_fn)
    if loss is None:
        raise InvalidInput("loss_fn", part.loss_fn, f"must be one of {', '.join(LOSSES)}")
    for name, value in part.loss_fn_config:
        if name not in loss.defaults or isinstance(value, str) or not np.isfinite(value):
            allowed = f"{part.loss_fn} takes finite numbers for: {', '.join(loss.defaults)}"
            raise InvalidInput(f"loss_fn_config.{name}", value, allowed)
    if not part.data:
        raise InvalidInput("data", 0, "must hold at least one datum")
    for number, datum in zip(part.numbers, part.data, strict=True):
        _check_datum(f"data[{number}]", datum, loss, config)


def _check_datum(where: str, datum: Datum, loss: Loss, config: DecoderConfig) -> None:
    if not 1 <= datum.num_tokens <= config.max_context_tokens:
        allowed = f"must be 1 to {config.max_context_tokens} tokens"
        raise InvalidInput(f"{where}.model_input.length", datum.num_tokens, allowed)
    _check_tokens(f"{where}.model_input", datum.tokens_T, config.vocab_size)
    inputs = f"{where}.loss_fn_inputs"
    for name in ("target_tokens", *loss.required):
        if name not in datum.loss_fn_inputs:
            raise InvalidInput(f"{inputs}.{name}", "missing", "the loss needs it")
    targets = np.asarray(datum.loss_fn_inputs["target_tokens"])
    if targets.ndim not in (1, 2) or targets.shape[0] != datum.num_tokens or targets.size == 0:
        allowed = f"must be ({datum.num_tokens},) or ({datum.num_tokens}, K): one row an input token"
        raise InvalidInput(f"{inputs}.target_tokens.shape", targets.shape, allowed)
    _check_tokens(f"{inputs}.target_tokens", targets, config.vocab_size)
    for name, array in datum.loss_fn_inputs.items():
        if name not in loss.required and name not in loss.defaults:
            continue  # target_tokens, and what another loss reads: see LOSS_INPUTS
        if array.shape != targets.shape:
            raise InvalidInput(f"{inputs}.{name}.shape", array.shape, f"must be that of target_tokens, {targets.shape}")
        if array.dtype.kind not in "fiu":
            raise InvalidInput(f"{inputs}.{name}.dtype", str(array.dtype), "must be numbers")
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(array.astype(np.float32))
        if not is_finite.all():
            place, value = _first(array, ~is_finite)
            raise InvalidInput(f"{inputs}.{name}{place}", value, "must be finite in float32")


def _check_tokens(where: str, tokens: npt.NDArray[np.generic], vocab_size: int) -> None:
    if tokens.dtype.kind not in "iu":
        raise InvalidInput(f"{where}.dtype", str(tokens.dtype), "must be integers")
    outside = np.less(tokens, 0) | np.greater_equal(tokens, vocab_size)
    if outside.any():
        place, value = _first(tokens, outside)
        raise InvalidInput(f"{where}{place}", value, f"must be a token id, 0 to {vocab_size - 1}")


def _first(array: npt.NDArray[np.generic], is_bad: npt.NDArray[np.bool_]) -> tuple[str, object]:
    """Index and value of the first bad element."""
    index = tuple(int(i) for i in np.argwhere(is_bad)[0])
    return "".join(f"[{i}]" for i in index), array[index].item()
