"""forward and forward_backward of many adapters in shared passes; each operation gets what it would get alone.

Shape letters: ``T`` packed rows of a micro-batch, ``M`` target tokens, ``P`` an adapter's parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tuft.engine.base import RunLoss
from tuft.engine.checks import check_operation
from tuft.engine.failures import engine_error
from tuft.engine.losses import LOSSES, LossRecord, terms_and_gradient
from tuft.engine.packing import Chunk, MicroBatch, PackedTokens, pack, plan
from tuft.errors import InvalidInput, NotFound, TuftError, UserError
from tuft.models.decoder import Decoder
from tuft.models.head import LossGradient, Targets, score
from tuft.models.lora import Adapter, Segment
from tuft.models.packed import PackedAttention
from tuft.types import Float32Array, LossResult


class _Pending:
    """One operation on its way: what its chunks have produced so far."""

    def __init__(self, operation: RunLoss, adapter: Adapter) -> None:
        self.operation = operation
        self.adapter = adapter
        self.loss = LOSSES[operation.loss_fn]
        self.num_done = 0
        self.logprobs: list[Float32Array] = []
        self.loss_terms: list[Float32Array] = []
        self.metrics: defaultdict[str, list[Float32Array]] = defaultdict(list)
        self.gradients_P = torch.zeros_like(adapter.params_P) if operation.backward else None
        self.gradients = adapter.layout.views(self.gradients_P) if self.gradients_P is not None else None

    def loss_inputs(self, chunk: Chunk) -> dict[str, Tensor]:
        """The loss's inputs over the chunk's targets, ``[M]`` float32 each."""
        data = self.operation.data[chunk.first : chunk.stop]
        config = dict(self.operation.loss_fn_config)
        inputs = {}
        for name in (*self.loss.required, *self.loss.defaults):
            arrays = []
            for datum in data:
                given = datum.loss_fn_inputs.get(name)
                if given is None:
                    value = config.get(name, self.loss.defaults.get(name))
                    given = np.full(datum.loss_fn_inputs["target_tokens"].shape, value)
                arrays.append(given.astype(np.float32).ravel())
            inputs[name] = torch.from_numpy(np.concatenate(arrays)).to(self.adapter.params_P.device)
        return inputs

    def take(self, record: LossRecord) -> Tensor | None:
        """Keep a piece's log-probabilities and losses; returns dloss/dlogprob if the operation wants gradients."""
        terms, gradient_M = terms_and_gradient(self.loss, record)
        self.logprobs.append(record.logprobs_M.cpu().numpy())
        self.loss_terms.append(terms.loss_M.cpu().numpy())
        for name, values_M in terms.metrics.items():
            self.metrics[name].append(values_M.cpu().numpy())
        return gradient_M if self.operation.backward else None

    @property
    def is_done(self) -> bool:
        return self.num_done == len(self.operation.data)

    def finish(self) -> LossResult:
        """Hand the gradients to the adapter. Raises UserError that names the datum if anything is not finite."""
        shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in self.operation.data]
        bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]).tolist()
        logprobs_M, loss_M = np.concatenate(self.logprobs), np.concatenate(self.loss_terms)
        for index, (start, stop) in enumerate(pairwise(bounds)):
            if not np.isfinite(logprobs_M[start:stop]).all():
                raise UserError(f"data[{index}].logprobs: not finite; the adapter's weights have grown too large")
            if not np.isfinite(loss_M[start:stop]).all():
                raise UserError(f"data[{index}].loss_fn_inputs: the loss is not finite; its inputs are too large")
        if self.gradients_P is not None:
            if not torch.isfinite(self.gradients_P).all():
                raise UserError("data: the gradients are not finite; loss_fn_inputs or adapter weights are too large")
            self.adapter.gradients_P.add_(self.gradients_P)
        metrics = {"loss:sum": float(loss_M.sum(dtype=np.float64))}
        for name, pieces in self.metrics.items():
            values_M = np.concatenate(pieces)
            metrics[name] = float((np.mean if name.endswith(":mean") else np.sum)(values_M, dtype=np.float64))
        logprobs = tuple(
            logprobs_M[start:stop].reshape(shape) for (start, stop), shape in zip(pairwise(bounds), shapes, strict=True)
        )
        return LossResult(logprobs, metrics)


class Trainer:
    """Computes ``RunLoss`` operations over one decoder, at most ``micro_batch_tokens`` tokens a pass (a single longer
    sequence excepted)."""

    def __init__(self, decoder: Decoder, micro_batch_tokens: int) -> None:
        self.decoder = decoder
        self.micro_batch_tokens = micro_batch_tokens

    def run(
        self,
        operations: Sequence[RunLoss],
        adapters: Mapping[str, Adapter],
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, LossResult | TuftError]]:
        """Yield ``(index, result)`` of every operation, as each ends. ``between`` is called between passes.

        An operation's gradients are added to its adapter's only when all of it has succeeded. What a shared pass
        raises is blamed on nobody: its operations are computed again, each alone, from their start.
        """
        pending: dict[int, _Pending] = {}
        for index, operation in enumerate(operations):
            try:
                pending[index] = self._accept(operation, adapters)
            except TuftError as error:
                yield index, error
        accepted = {index: operations[index] for index in pending}
        for number, batch in enumerate(plan(accepted, self.micro_batch_tokens)):
            live = tuple(chunk for chunk in batch if chunk.operation in pending)
            if not live:
                continue
            if number:
                between()
            try:
                self._run_batch(live, operations, pending)
            except Exception as error:  # noqa: BLE001 - what a pass raises is an operation's result; the engine lives on
                indices = list(dict.fromkeys(chunk.operation for chunk in live))
                for index in indices:
                    del pending[index]
                if len(indices) == 1:
                    yield indices[0], engine_error(error, "loss")
                    continue
                for index in indices:
                    between()
                    for _, result in self.run([operations[index]], adapters, between):
                        yield index, result
                continue
            for index in dict.fromkeys(chunk.operation for chunk in live):
                if pending[index].is_done:
                    yield index, _finished(pending.pop(index))

    def _accept(self, operation: RunLoss, adapters: Mapping[str, Adapter]) -> _Pending:
        adapter = adapters.get(operation.adapter_id)
        if adapter is None:
            raise NotFound(f"adapter_id: got {operation.adapter_id!r}; no such adapter is loaded")
        if operation.backward and not adapter.trainable:
            raise InvalidInput("adapter_id", operation.adapter_id, "must be trainable, not frozen sampler weights")
        check_operation(operation, self.decoder.config)
        return _Pending(operation, adapter)

    def _run_batch(self, batch: MicroBatch, operations: Sequence[RunLoss], pending: Mapping[int, _Pending]) -> None:
        """One pass. What it produces is in ``pending`` afterwards."""
        device = self.decoder.device
        backward = operations[batch[0].operation].backward
        packed = pack(operations, batch)
        segments = [
            Segment(pending[chunk.operation].adapter, start, stop, pending[chunk.operation].gradients)
            for chunk, (start, stop) in zip(batch, packed.row_bounds, strict=True)
        ]
        tokens_T = torch.as_tensor(packed.tokens_T, device=device)
        positions_T = torch.as_tensor(packed.positions_T, device=device)
        attention = PackedAttention(packed.lengths, device)
        with torch.set_grad_enabled(backward):
            x_TD = self.decoder.hidden(tokens_T, positions_T, attention, segments)
        scores = score(
            self.decoder,
            x_TD.detach(),
            segments,
            Targets(packed.target_rows_M, packed.target_tokens_M),
            _loss_gradient(batch, packed, pending),
        )
        if backward:
            x_TD.backward(scores.dhidden_TD)
        for chunk in batch:
            pending[chunk.operation].num_done += chunk.stop - chunk.first


def _loss_gradient(batch: MicroBatch, packed: PackedTokens, pending: Mapping[int, _Pending]) -> LossGradient:
    """What the head asks for every piece of a chunk: the operation's own loss on it."""
    inputs = [pending[chunk.operation].loss_inputs(chunk) for chunk in batch]
    stops = [stop for _, stop in packed.target_bounds]

    def gradient(first: int, stop: int, logprobs_M: Tensor) -> Tensor | None:
        number = bisect_right(stops, first)
        start = packed.target_bounds[number][0]
        piece = {name: values_M[first - start : stop - start] for name, values_M in inputs[number].items()}
        return pending[batch[number].operation].take(LossRecord(logprobs_M, piece))

    return gradient


def _finished(operation: _Pending) -> LossResult | TuftError:
    try:
        return operation.finish()
    except TuftError as error:
        return error
