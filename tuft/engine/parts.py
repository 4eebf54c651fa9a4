"""Parts of operations: one part's way through a pass, and an operation between its first part and its last.

Shape letters: ``M`` target tokens of a part, ``P`` an adapter's parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tuft.engine.base import RunLoss
from tuft.engine.losses import LOSSES, LossRecord, terms_and_gradient
from tuft.errors import TuftError, UserError
from tuft.models.lora import Adapter
from tuft.models.transfer import to_device
from tuft.types import Float32Array, Int64Array, LossResult


class PartInPass:
    """What one pass makes of a part, kept apart until the pass has succeeded.

    ``order_M``: the pass scores the part's targets in this order of theirs. ``gradients_P`` is the part's own buffer.
    """

    def __init__(self, part: RunLoss, adapter: Adapter, order_M: Int64Array) -> None:
        self.part = part
        self.adapter = adapter
        self.gradients_P = torch.zeros_like(adapter.params_P) if part.backward else None
        self.gradients = adapter.layout.views(self.gradients_P) if self.gradients_P is not None else None
        self._order_M = order_M
        self._loss = LOSSES[part.loss_fn]
        self._inputs = self._loss_inputs()
        self._pieces: defaultdict[str, list[Float32Array]] = defaultdict(list)

    def _loss_inputs(self) -> dict[str, Tensor]:
        """The loss's inputs over the part's targets, ``[M]`` float32 each."""
        config = dict(self.part.loss_fn_config)
        inputs = {}
        for name in (*self._loss.required, *self._loss.defaults):
            arrays = []
            for datum in self.part.data:
                given = datum.loss_fn_inputs.get(name)
                if given is None:
                    value = config.get(name, self._loss.defaults.get(name))
                    given = np.full(datum.loss_fn_inputs["target_tokens"].shape, value)
                arrays.append(given.astype(np.float32).ravel())
            values_M = np.concatenate(arrays)[self._order_M]
            inputs[name] = to_device(values_M, self.adapter.params_P.device)
        return inputs

    def score(self, first: int, stop: int, logprobs_M: Tensor) -> Tensor | None:
        """Keep the log-probabilities and losses of the targets ``first:stop``; returns dloss/dlogprob if the part
        wants gradients."""
        piece = {name: values_M[first:stop] for name, values_M in self._inputs.items()}
        terms, gradient_M = terms_and_gradient(self._loss, LossRecord(logprobs_M, piece))
        for name, values_M in {"logprobs": logprobs_M, "loss:sum": terms.loss_M, **terms.metrics}.items():
            self._pieces[name].append(values_M.cpu().numpy())
        return gradient_M if self.part.backward else None

    def values(self) -> dict[str, Float32Array]:
        """Of every target, datum by datum: ``logprobs``, ``loss:sum`` (its loss), and the loss's own metrics."""
        found = {}
        for name, pieces in self._pieces.items():
            found[name] = np.empty(len(self._order_M), dtype=np.float32)
            found[name][self._order_M] = np.concatenate(pieces)
        return found


class PendingOperation:
    """What an operation's parts have produced so far; ``error``: why one of them failed, and with it all of it.

    Everything is kept in the order in which it was computed; ``finish`` puts the data into the order the user gave.
    """

    def __init__(self) -> None:
        self.error: TuftError | None = None
        self.num_data = 0
        self._numbers: list[int] = []
        self._shapes: list[tuple[int, ...]] = []
        self._values: defaultdict[str, list[Float32Array]] = defaultdict(list)
        self._gradients_P: Tensor | None = None

    def fail(self, error: TuftError) -> None:
        self.error = error.with_traceback(None)  # its frames hold the pass's tensors
        self._values.clear()
        self._gradients_P = None

    def add(self, done: PartInPass) -> None:
        """Raises UserError that names the datum if anything is not finite."""
        values = done.values()
        shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in done.part.data]
        _check_finite(values["logprobs"], values["loss:sum"], shapes, done.part.numbers)
        if done.gradients_P is not None:
            # a part's gradients are summed by themselves first: what a failed pass left in a buffer goes with it
            if self._gradients_P is None:
                self._gradients_P = done.gradients_P
            else:
                self._gradients_P.add_(done.gradients_P)
            if not all(torch.isfinite(bound) for bound in torch.aminmax(self._gradients_P)):
                raise UserError("data: the gradients are not finite; loss_fn_inputs or adapter weights are too large")
        for name, values_M in values.items():
            self._values[name].append(values_M)
        self._numbers += done.part.numbers
        self._shapes += shapes

    def finish(self, adapter: Adapter) -> LossResult:
        """Hand the gradients to the adapter."""
        if self._gradients_P is not None:
            adapter.add_gradients(self._gradients_P)
        values = {name: np.concatenate(arrays) for name, arrays in self._values.items()}
        logprobs_M = values.pop("logprobs")
        metrics = {
            name: float((np.mean if name.endswith(":mean") else np.sum)(values_M, dtype=np.float64))
            for name, values_M in values.items()
        }
        of_datum = {
            number: logprobs_M[start:stop].reshape(shape)
            for number, (start, stop), shape in zip(
                self._numbers, pairwise(_bounds(self._shapes)), self._shapes, strict=True
            )
        }
        return LossResult(tuple(of_datum[number] for number in sorted(of_datum)), metrics)


def _bounds(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    bounds: list[int] = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]).tolist()
    return bounds


def _check_finite(
    logprobs_M: Float32Array, loss_M: Float32Array, shapes: Sequence[tuple[int, ...]], numbers: Sequence[int]
) -> None:
    for number, (start, stop) in zip(numbers, pairwise(_bounds(shapes)), strict=True):
        if not np.isfinite(logprobs_M[start:stop]).all():
            raise UserError(f"data[{number}].logprobs: not finite; the adapter's weights have grown too large")
        if not np.isfinite(loss_M[start:stop]).all():
            raise UserError(f"data[{number}].loss_fn_inputs: the loss is not finite; its inputs are too large")
