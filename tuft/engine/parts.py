"""Parts of operations: one part's way through a pass, and an operation between its first part and its last.

Shape letters: ``M`` target tokens of a part, ``P`` an adapter's parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuft.engine.base import RunLoss
from tuft.engine.custom_loss import custom_terms
from tuft.engine.losses import LOSSES, Loss, LossRecord, LossTerms, terms_and_gradient
from tuft.errors import TuftError, UserError
from tuft.losses import LOSS_SIGNATURES
from tuft.models.lora import Adapter
from tuft.models.transfer import to_device
from tuft.types import Datum, Float32Array, Int64Array, LossResult

Array = npt.NDArray[Any]


class PartInPass:
    """What one pass makes of a part, kept apart until the pass has succeeded.

    ``order_M``: the pass scores the part's targets in this order of theirs. ``gradients_P`` is the part's own buffer.
    Once it has been evaluated, ``logprobs`` and ``losses`` hold those of each datum, and ``metrics`` all values of each
    metric; or ``error`` says what is wrong with the loss itself.
    """

    def __init__(self, part: RunLoss, adapter: Adapter, order_M: Int64Array) -> None:
        self.part = part
        self.adapter = adapter
        self.gradients_P = torch.zeros_like(adapter.params_P) if part.backward else None
        self.gradients = adapter.layout.views(self.gradients_P) if self.gradients_P is not None else None
        self.logprobs: list[Float32Array] = []
        self.losses: list[float] = []
        self.metrics: defaultdict[str, list[Float32Array]] = defaultdict(list)
        self.error: UserError | None = None
        self._order_M = order_M
        self._loss = LOSSES[part.loss_fn] if part.custom_loss is None else Loss(custom_terms(part.custom_loss), "datum")
        self._inputs = [_loss_inputs(datum, part) for datum in part.data]
        self._dlogprobs_M: Tensor | None = None

    @property
    def comes_first(self) -> bool:
        """Its gradients depend on all logprobs of a datum, so it must be evaluated before the pass asks for any."""
        return self.part.backward and self._loss.scope == "datum"

    def evaluate(self, logprobs_M: Tensor) -> None:
        """Losses and metrics from the part's log-probabilities, on the CPU; where the part comes first, gradients."""
        data_M = np.empty(len(self._order_M), dtype=np.float32)
        data_M[self._order_M] = logprobs_M.cpu().numpy()
        shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in self.part.data]
        bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        self.logprobs = [
            data_M[start:stop].reshape(shape) for shape, (start, stop) in zip(shapes, pairwise(bounds), strict=True)
        ]
        if self._loss.scope == "token":
            self._keep(self._loss.terms(LossRecord(torch.from_numpy(data_M), _tensors(self._all_inputs))), bounds[:-1])
            return
        gradients = []
        for number, logprobs, inputs in zip(self.part.numbers, self.logprobs, self._inputs, strict=True):
            try:
                gradients.append(self._evaluate_datum(LossRecord(torch.from_numpy(logprobs), _tensors(inputs))))
            except Exception as error:  # a client's own loss is that client's to mend, whatever it raises
                if self.part.custom_loss is None:
                    raise
                self.error = UserError(f"data[{number}]: custom loss {self.part.custom_loss.name!r}: {error}")
                return
        if self.part.backward:
            self._dlogprobs_M = to_device(np.concatenate(gradients)[self._order_M], logprobs_M.device)

    def _evaluate_datum(self, record: LossRecord) -> Float32Array:
        """Its gradient is 0 where nobody wants any."""
        gradient = torch.zeros_like(record.logprobs_M)
        if self.part.backward:
            terms, gradient = terms_and_gradient(self._loss, record)
        else:
            terms = self._loss.terms(record)
        self._keep(terms, np.zeros(1, dtype=np.int64))
        if not torch.isfinite(gradient).all() and np.isfinite(self.losses[-1]):
            raise UserError("the gradient of the loss is not finite")
        return gradient.numpy().ravel()

    def _keep(self, terms: LossTerms, starts: Int64Array) -> None:
        """``starts``: where in the terms each datum begins."""
        with torch.no_grad():
            self.losses += np.add.reduceat(terms.loss_M.double().numpy().ravel(), starts).tolist()
            for name, values in terms.metrics().items():
                self.metrics[name].append(values.numpy())

    def gradient(self, first: int, stop: int, logprobs_M: Tensor) -> Tensor | None:
        """dloss/dlogprob of the targets ``first:stop``, if the part wants gradients."""
        if not self.part.backward or self.error is not None:
            return None
        if self._dlogprobs_M is not None:
            return self._dlogprobs_M[first:stop]
        piece = {name: values_M[first:stop] for name, values_M in self._inputs_in_pass.items()}
        return terms_and_gradient(self._loss, LossRecord(logprobs_M, piece))[1]

    @cached_property
    def _all_inputs(self) -> dict[str, Array]:
        """One datum after the other. Inputs that data may lack are read by losses of scope ``datum`` alone."""
        names = self._inputs[0]
        return {name: np.concatenate([inputs[name].ravel() for inputs in self._inputs]) for name in names}

    @cached_property
    def _inputs_in_pass(self) -> dict[str, Tensor]:
        """On the pass's device, in its order."""
        device = self.adapter.params_P.device
        return {name: to_device(values_M[self._order_M], device) for name, values_M in self._all_inputs.items()}


def _loss_inputs(datum: Datum, part: RunLoss) -> dict[str, Array]:
    """What the loss reads of a datum: what it carries, else what the operation says, else the default."""
    if part.custom_loss is not None:  # which reads what it is given
        return {
            name: np.array(datum.loss_fn_inputs[name]).reshape(() if rank == 0 else datum.loss_fn_inputs[name].shape)
            for name, rank in part.custom_loss.inputs[1:]
        }
    signature = LOSS_SIGNATURES[part.loss_fn]
    values = {**signature.optional, **signature.config, **dict(part.loss_fn_config)}
    inputs: dict[str, Array] = {}
    for name in signature.names:
        given, value = datum.loss_fn_inputs.get(name), values.get(name)
        if given is None and value is not None:
            given = np.full(datum.loss_fn_inputs["target_tokens"].shape, value)
        if given is not None:
            inputs[name] = np.array(given, dtype=np.float32)
    return inputs


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PendingOperation:
    """What an operation's parts have produced so far; ``error``: why one of them failed, and with it all of it.

    Everything is kept in the order in which it was computed; ``finish`` puts the data into the order the user gave.
    """

    def __init__(self) -> None:
        self.error: TuftError | None = None
        self.num_data = 0
        self._logprobs: dict[int, Float32Array] = {}
        self._losses: list[float] = []
        self._metrics: defaultdict[str, list[Float32Array]] = defaultdict(list)
        self._gradients_P: Tensor | None = None

    def fail(self, error: TuftError) -> None:
        self.error = error.with_traceback(None)  # its frames hold the pass's tensors
        self._logprobs.clear()
        self._losses.clear()
        self._metrics.clear()
        self._gradients_P = None

    def add(self, done: PartInPass) -> None:
        """Raises UserError that names the datum if anything is not finite."""
        for number, logprobs in zip(done.part.numbers, done.logprobs, strict=True):
            if not np.isfinite(logprobs).all():
                raise UserError(f"data[{number}].logprobs: not finite; the adapter's weights have grown too large")
        if done.error is not None:
            raise done.error
        for number, loss in zip(done.part.numbers, done.losses, strict=True):
            if not np.isfinite(loss):
                raise UserError(f"data[{number}].loss_fn_inputs: the loss is not finite; its inputs are too large")
        if done.gradients_P is not None:
            # a part's gradients are summed by themselves first: what a failed pass left in a buffer goes with it
            if self._gradients_P is None:
                self._gradients_P = done.gradients_P
            else:
                self._gradients_P.add_(done.gradients_P)
            if not all(torch.isfinite(bound) for bound in torch.aminmax(self._gradients_P)):
                raise UserError("data: the gradients are not finite; loss_fn_inputs or adapter weights are too large")
        self._logprobs.update(zip(done.part.numbers, done.logprobs, strict=True))
        self._losses += done.losses
        for name, values in done.metrics.items():
            self._metrics[name] += values

    def finish(self, adapter: Adapter) -> LossResult:
        """Hand the gradients to the adapter."""
        if self._gradients_P is not None:
            adapter.add_gradients(self._gradients_P)
        metrics = {"loss:sum": sum(self._losses)}
        for name, arrays in self._metrics.items():
            values = np.concatenate(arrays).astype(np.float64)
            if len(values):  # a mean of nothing is no number
                metrics[name] = float(_REDUCTIONS[name.rpartition(":")[2]](values))
        return LossResult(tuple(self._logprobs[number] for number in sorted(self._logprobs)), metrics)


_REDUCTIONS: Mapping[str, Callable[[npt.NDArray[np.float64]], np.float64]] = {
    "mean": np.mean,
    "sum": np.sum,
    "min": np.min,
    "max": np.max,
}
