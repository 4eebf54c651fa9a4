"""Sequences of token ids, and whether a model can read them: the service checks before it queues, the engine before it
computes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tuft.errors import InvalidInput


class TokenBounds(Protocol):
    """What of a model bounds its sequences."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_tokens(self) -> int: ...


def check_tokens(tokens_T: npt.NDArray[np.generic], where: str, model: TokenBounds) -> None:
    """A sequence of ids that the model can read: not empty, within its context, all in its vocabulary."""
    if not 1 <= len(tokens_T) <= model.max_context_tokens:
        allowed = f"must be 1 to {model.max_context_tokens} tokens, the context of {model.name}"
        raise InvalidInput(where, f"{len(tokens_T)} tokens", allowed)
    check_ids(tokens_T, where, model)


def check_ids(ids: npt.NDArray[np.generic], where: str, model: TokenBounds) -> None:
    """Ids of the vocabulary, in an array of any shape."""
    if ids.dtype.kind not in "iu":
        raise InvalidInput(where, str(ids.dtype), "must be integers")
    outside = np.less(ids, 0) | np.greater_equal(ids, model.vocab_size)
    if outside.any():
        place, value = first_of(ids, outside)
        raise InvalidInput(f"{where}{place}", value, f"token ids of {model.name} are 0 to {model.vocab_size - 1}")


def first_of(array: npt.NDArray[np.generic], is_meant: npt.NDArray[np.bool_]) -> tuple[str, object]:
    """Index (``[3][0]``) and value of the first element that ``is_meant``."""
    index = tuple(int(i) for i in np.argwhere(is_meant)[0])
    return "".join(f"[{i}]" for i in index), array[index].item()
