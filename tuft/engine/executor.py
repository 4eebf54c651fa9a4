"""Computes what the mailbox brings, in the engine process: training batch by batch, sampling all the time.

One thread. Between two passes of the trainer the samplers step for about as long as the pass took, so neither starves.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Never

from tuft.engine.base import (
    Command,
    CopyAdapter,
    CreateAdapter,
    DropAdapter,
    ExportAdapter,
    LoadAdapter,
    OptimStep,
    RunLoss,
    Sample,
)
from tuft.engine.failures import engine_error
from tuft.engine.loaded import LoadedModel
from tuft.engine.mailbox import Batch, Reply
from tuft.engine.optim import optim_step
from tuft.errors import EngineError, InvalidInput, TuftError
from tuft.models.lora import Adapter

_Numbered = tuple[int, Command]
_AdapterCommand = CreateAdapter | LoadAdapter | CopyAdapter | ExportAdapter | DropAdapter | OptimStep


@dataclass(frozen=True, slots=True)
class _LoadedAdapter:
    adapter: Adapter
    model: LoadedModel


class Executor:
    """``send`` delivers a reply as soon as it is known. Adapters are this process's own: they end with it."""

    def __init__(self, models: Sequence[LoadedModel], inbox: SimpleQueue[Batch], send: Callable[[Reply], None]) -> None:
        self._models = {name: model for model in models for name in (model.info.name, *model.info.aliases)}
        self._samplers = [model.sampler for model in models]
        self._inbox = inbox
        self._send = send
        self._batches: deque[list[_Numbered]] = deque()
        self._adapters: dict[str, _LoadedAdapter] = {}
        self._pass_began = 0.0

    def run(self) -> Never:
        while True:
            self._collect(wait=not self._batches and not self._is_sampling)
            if self._batches:
                self._pass_began = time.monotonic()
                self._compute(self._batches[0])
                self._batches.popleft()
                self._sample_as_long()
            else:
                self._step()

    # --- the mailbox --------------------------------------------------------------------------------------------------

    def _collect(self, wait: bool) -> None:
        """Take in what has arrived."""
        try:
            while True:
                self._queue(self._inbox.get(block=wait))
                wait = False
        except Empty:
            return

    def _queue(self, batch: Batch) -> None:
        """Samples join at once, except behind a command that makes or changes their adapter."""
        later: list[_Numbered] = []
        for number, command in batch.commands:
            if isinstance(command, Sample) and not self._is_touched(command.adapter_id, later):
                self._join(number, command)
            else:
                later.append((number, command))
        if later:
            self._batches.append(later)

    def _is_touched(self, adapter_id: str | None, later: Iterable[_Numbered]) -> bool:
        if adapter_id is None:
            return False
        queued = [*(item for batch in self._batches for item in batch), *later]
        return any(adapter_id in _adapter_ids(command) for _, command in queued)

    def _reply(self, number: int, result: object) -> None:
        self._send(Reply(number, result))

    # --- sampling -----------------------------------------------------------------------------------------------------

    @property
    def _is_sampling(self) -> bool:
        return any(sampler.active for sampler in self._samplers)

    def _step(self) -> None:
        for sampler in self._samplers:
            if sampler.active:
                for number, outcome in sampler.step():
                    assert isinstance(number, int)
                    self._reply(number, outcome)

    def _sample_as_long(self) -> None:
        """Sample for as long as the pass took that has just ended, or until nobody wants any."""
        now = time.monotonic()
        until = now + (now - self._pass_began)
        self._collect(wait=False)
        while self._is_sampling:
            self._step()
            self._collect(wait=False)
            if time.monotonic() >= until:
                break
        self._pass_began = time.monotonic()

    def _join(self, number: int, command: Sample) -> None:
        try:
            model, adapter = self._base_model(command.base_model), None
            if command.adapter_id is not None:
                loaded = self._loaded(command.adapter_id)
                if loaded.model is not model:
                    name = loaded.model.info.name
                    raise EngineError(f"adapter {command.adapter_id!r} is of {name!r}, not of {command.base_model!r}")
                # what is trained meanwhile must not reach a sequence that has begun
                adapter = loaded.adapter.frozen_copy() if loaded.adapter.trainable else loaded.adapter
            model.sampler.add(number, command, adapter)
        except TuftError as error:
            self._reply(number, error)

    # --- training and adapters ----------------------------------------------------------------------------------------

    def _compute(self, batch: Sequence[_Numbered]) -> None:
        """Losses of one base model are computed together, unless a command between them concerns their adapter."""
        losses: dict[int, RunLoss] = {}
        for number, command in batch:
            if isinstance(command, RunLoss):
                losses[number] = command
                continue
            if any(loss.adapter_id in _adapter_ids(command) for loss in losses.values()):
                self._run_losses(losses)
                losses = {}
            if isinstance(command, Sample):
                self._join(number, command)
            else:
                self._reply(number, self._result(command))
        self._run_losses(losses)

    def _run_losses(self, losses: Mapping[int, RunLoss]) -> None:
        of_model: defaultdict[str, dict[int, RunLoss]] = defaultdict(dict)
        for number, command in losses.items():
            try:
                of_model[self._loaded(command.adapter_id).model.info.name][number] = command
            except TuftError as error:
                self._reply(number, error)
        for name, commands in of_model.items():
            unanswered = set(commands)
            try:
                for number, result in self._loss_results(self._models[name], commands):
                    unanswered.remove(number)
                    self._reply(number, result)
            except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
                for number in unanswered:
                    self._reply(number, engine_error(error, "loss"))

    def _loss_results(self, model: LoadedModel, commands: Mapping[int, RunLoss]) -> Iterator[tuple[int, object]]:
        adapters = {command.adapter_id: self._adapters[command.adapter_id].adapter for command in commands.values()}
        numbers = list(commands)
        for index, result in model.trainer.run(list(commands.values()), adapters, self._sample_as_long):
            yield numbers[index], result

    def _result(self, command: _AdapterCommand) -> object:
        try:
            return self._execute(command)
        except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
            return engine_error(error, type(command).__name__)

    def _execute(self, command: _AdapterCommand) -> object:
        match command:
            case CreateAdapter(adapter_id, base_model, spec):
                model = self._base_model(base_model)
                adapter = Adapter.initialised(model.info.linear_shapes, spec, model.decoder.device)
                self._adapters[adapter_id] = _LoadedAdapter(adapter, model)
            case LoadAdapter(adapter_id, base_model, state, trainable):
                model = self._base_model(base_model)
                adapter = Adapter.from_state(model.info.linear_shapes, state, model.decoder.device, trainable)
                self._adapters[adapter_id] = _LoadedAdapter(adapter, model)
            case CopyAdapter(source_id, adapter_id):
                source = self._loaded(source_id)
                self._adapters[adapter_id] = _LoadedAdapter(source.adapter.frozen_copy(), source.model)
            case DropAdapter(adapter_id):
                self._adapters.pop(adapter_id, None)  # sequences that decode with it keep it until they end
            case ExportAdapter(adapter_id, with_optimizer):
                return self._loaded(adapter_id).adapter.state(with_optimizer)
            case OptimStep(adapter_id, params):
                adapter = self._loaded(adapter_id).adapter
                if not adapter.trainable:
                    raise InvalidInput("adapter_id", adapter_id, "must be trainable, not frozen sampler weights")
                return optim_step(adapter, params)
        return None

    def _base_model(self, name: str) -> LoadedModel:
        model = self._models.get(name)
        if model is None:
            raise EngineError(f"base model {name!r} is not loaded; loaded are: {', '.join(self._models)}")
        return model

    def _loaded(self, adapter_id: str) -> _LoadedAdapter:
        loaded = self._adapters.get(adapter_id)
        if loaded is None:
            raise EngineError(f"adapter {adapter_id!r} is not loaded in this engine process")
        return loaded


def _adapter_ids(command: Command) -> tuple[str | None, ...]:
    """The adapters that a command reads or changes."""
    return (command.source_id, command.adapter_id) if isinstance(command, CopyAdapter) else (command.adapter_id,)
