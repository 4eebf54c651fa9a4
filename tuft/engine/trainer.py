"""forward and forward_backward of many adapters in shared passes; each operation gets what it would get alone.

Shape letters: ``T`` packed rows of a pass, ``M`` target tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuft.engine.base import RunLoss
from tuft.engine.failures import engine_error
from tuft.engine.packing import PackedPass, pack
from tuft.engine.parts import PartInPass, PendingOperation
from tuft.errors import EngineError, InvalidInput, NotFound, TuftError, UserError
from tuft.footprint import check_sequences
from tuft.losses import check_loss
from tuft.models.decoder import Decoder
from tuft.models.head import LossGradient, Targets, score
from tuft.models.lora import Adapter, Segment
from tuft.models.packed import packed_attention
from tuft.models.transfer import to_device
from tuft.types import LossResult, MemoryShares


@dataclass(frozen=True, slots=True)
class _Bounds:
    name: str
    vocab_size: int
    max_context_tokens: int


class Trainer:
    """Computes parts of ``RunLoss`` operations over one decoder, and keeps an operation until its last part has come.

    A pass of more rows than ``micro_batch_tokens`` (one long sequence) does not keep its activations for the backward.
    ``share_prefixes`` False computes every sequence whole, to measure what sharing saves. ``memory``: what a pass may
    have of it.
    """

    def __init__(
        self,
        decoder: Decoder,
        micro_batch_tokens: int,
        share_prefixes: bool = True,
        memory: MemoryShares | None = None,
    ) -> None:
        self.decoder = decoder
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefixes = share_prefixes
        self._memory = memory
        config = decoder.config
        self._bounds = _Bounds("the model", config.vocab_size, config.max_context_tokens)
        self._pending: dict[tuple[str, str], PendingOperation] = {}

    def run(
        self,
        parts: Sequence[RunLoss],
        adapters: Mapping[str, Adapter],
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, LossResult | TuftError | None]]:
        """Compute ``parts`` in one pass (two if some want gradients and some do not), and yield ``(index, reply)`` of
        every part. The reply to an operation's last part is the whole operation's result, to the others None; where a
        part has failed it is that error, for the part and all that follow. ``between`` is called between passes.

        What a shared pass raises is blamed on nobody: its parts are computed again, each alone.
        """
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index, part in enumerate(parts):
            error = self._refusal(part, adapters)
            if error is not None:
                yield index, self._fail(part, error)
            else:
                waiting[part.backward].append(index)
        for indices in waiting.values():  # adapters that are alike stand together: some operators take them together
            indices.sort(key=lambda index: adapters[parts[index].adapter_id].kind)
        passes = deque(indices for indices in waiting.values() if indices)
        num_passes = 0
        while passes:
            indices = passes.popleft()
            if num_passes:
                between()
            num_passes += 1
            try:
                computed = self._compute([parts[index] for index in indices], adapters)
            except Exception as error:  # noqa: BLE001 - what a pass raises is a part's result; the engine lives on
                if len(indices) > 1:
                    passes.extendleft([index] for index in reversed(indices))
                else:
                    yield indices[0], self._fail(parts[indices[0]], engine_error(error, "loss"))
                continue
            for index, part_in_pass in zip(indices, computed, strict=True):
                yield index, self._take(part_in_pass)

    def forget(self, adapter_id: str) -> None:
        """Drop what is pending of an adapter that is unloaded or replaced."""
        self._pending = {key: pending for key, pending in self._pending.items() if key[0] != adapter_id}

    def _refusal(self, part: RunLoss, adapters: Mapping[str, Adapter]) -> TuftError | None:
        """Why ``part`` may not enter a pass that others share."""
        pending = self._pending.get(_key(part))
        if pending is not None and pending.error is not None:
            return pending.error
        adapter = adapters.get(part.adapter_id)
        if adapter is None:
            return NotFound(f"adapter_id: got {part.adapter_id!r}; no such adapter is loaded")
        if part.backward and not adapter.trainable:
            return InvalidInput("adapter_id", part.adapter_id, "must be trainable, not frozen sampler weights")
        try:
            check_loss(part.data, part.loss_fn, dict(part.loss_fn_config), self._bounds, part.numbers, part.custom_loss)
            check_sequences(part.data, adapter.layout.num_parameters, self._memory, part.numbers)
        except InvalidInput as error:
            return error
        if part.first_datum != (0 if pending is None else pending.num_data):
            return EngineError(f"data[{part.numbers[0]}]: the parts before it were dropped with their adapter")
        if pending is None and not part.is_last:
            pending = self._pending[_key(part)] = PendingOperation()
        if pending is not None:
            pending.num_data += len(part.data)
        return None

    def _compute(self, parts: Sequence[RunLoss], adapters: Mapping[str, Adapter]) -> list[PartInPass]:
        """One pass. Nothing but the parts it returns knows of it afterwards."""
        device = self.decoder.device
        packed = pack([part.data for part in parts], self.share_prefixes)
        computed = [
            PartInPass(part, adapters[part.adapter_id], order_M)
            for part, order_M in zip(parts, packed.target_orders, strict=True)
        ]
        segments = [
            Segment(part.adapter, start, stop, part.gradients)
            for part, (start, stop) in zip(computed, packed.row_bounds, strict=True)
        ]
        tokens_T = to_device(packed.tokens_T, device)
        positions_T = to_device(packed.positions_T, device)
        attention = packed_attention(
            packed.branches, self.decoder.ops, self.decoder.config.head_dim, self.decoder.dtype, device
        )
        backward = parts[0].backward
        with torch.set_grad_enabled(backward):
            x_TD = self.decoder.hidden(
                tokens_T,
                positions_T,
                attention,
                segments,
                keep_activations=len(tokens_T) <= self.micro_batch_tokens,
            )
        targets = Targets(packed.target_rows_M, packed.target_tokens_M)
        for part, segment, (first, stop) in zip(computed, segments, packed.target_bounds, strict=True):
            if part.comes_first:  # its own rows alone, so that others do not pay for it
                part.evaluate(self._logprobs(x_TD.detach(), segment, targets, first, stop))
        scores = score(self.decoder, x_TD.detach(), segments, targets, _loss_gradient(packed, computed))
        for part, (first, stop) in zip(computed, packed.target_bounds, strict=True):
            if not part.comes_first:
                part.evaluate(scores.logprobs_M[first:stop])
        if backward:
            x_TD.backward(scores.dhidden_TD)
        return computed

    def _logprobs(self, x_TD: Tensor, segment: Segment, targets: Targets, first: int, stop: int) -> Tensor:
        """Of the targets ``first:stop``, which lie on the rows of ``segment``."""
        own = Targets(targets.rows_M[first:stop] - segment.start, targets.tokens_M[first:stop])
        at_0 = replace(segment, start=0, stop=segment.stop - segment.start)
        return score(self.decoder, x_TD[segment.start : segment.stop], [at_0], own).logprobs_M

    def _take(self, part_in_pass: PartInPass) -> LossResult | TuftError | None:
        part = part_in_pass.part
        pending = self._pending.get(_key(part)) or PendingOperation()
        if pending.error is None:
            try:
                pending.add(part_in_pass)
            except UserError as error:
                return self._fail(part, error)
        if not part.is_last:
            return pending.error
        self._pending.pop(_key(part), None)
        return pending.error or pending.finish(part_in_pass.adapter)

    def _fail(self, part: RunLoss, error: TuftError) -> TuftError:
        """The operation's error, kept until its last part has been told of it."""
        if part.is_last:
            self._pending.pop(_key(part), None)
        else:
            self._pending.setdefault(_key(part), PendingOperation()).fail(error)
        return error


def _key(part: RunLoss) -> tuple[str, str]:
    return part.adapter_id, part.operation_id


def _loss_gradient(packed: PackedPass, parts: Sequence[PartInPass]) -> LossGradient:
    """What the head asks for every piece of a part: the part's own loss on it."""
    stops = [stop for _, stop in packed.target_bounds]

    def gradient(first: int, stop: int, logprobs_M: Tensor) -> Tensor | None:
        number = bisect_right(stops, first)
        start = packed.target_bounds[number][0]
        return parts[number].gradient(first - start, stop - start, logprobs_M)

    return gradient
