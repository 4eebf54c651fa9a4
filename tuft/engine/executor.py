"""Computes what the mailbox brings, in the engine process: training pass by pass, sampling all the time.

One thread. Losses and optimizer steps that wait together are computed together. After each pass, call of the optimizer
or other command the samplers step for about as long as that took, or the share of it that the pass says, so neither
starves.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Never

from tuft.engine.adapters import AdapterCommand, Adapters
from tuft.engine.base import CancelSample, CheckCustomLoss, Command, CopyAdapter, OptimStep, RunLoss, Sample
from tuft.engine.custom_loss import read_program
from tuft.engine.failures import cancelled, engine_error
from tuft.engine.loaded import LoadedModel
from tuft.engine.mailbox import Batch, Reply
from tuft.engine.optim import optim_steps
from tuft.engine.sampler import Outcome
from tuft.errors import TuftError
from tuft.models.lora import Adapter
from tuft.prefixes import shared_with_previous
from tuft.types import DimuonParams, OptimizerParams

_MORE_THAN_A_PASS = 2**62


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A command that has arrived. ``num_rows``: what it takes of a pass, if it is a loss; a step of dimuon takes one of
    its own, since it may last as long, and samples are not to wait for several."""

    number: int
    command: Command
    num_rows: int


class Executor:
    """``send`` delivers a reply as soon as it is known; ``pass_tokens`` bounds the rows of a pass that losses of
    several batches share; ``between`` is called between passes."""

    def __init__(
        self,
        adapters: Adapters,
        inbox: SimpleQueue[Batch],
        send: Callable[[Reply], None],
        pass_tokens: int,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._between = between
        self._adapters = adapters
        self._samplers = [model.sampler for model in adapters.models]
        self._inbox = inbox
        self._send = send
        self._pass_tokens = pass_tokens
        self._waiting: deque[_Waiting] = deque()
        self._pass_began = 0.0
        self._sampling_share = 1.0

    def run(self) -> Never:
        while True:
            self._collect(wait=not self._waiting and not self._is_sampling)
            self._between()
            if self._waiting:
                self._pass_began = time.monotonic()
                self._adapters.begin_turn()
                self._compute(self._next())
                self._sample_as_long()
            else:
                self._step()

    # --- the mailbox --------------------------------------------------------------------------------------------------

    def _collect(self, wait: bool) -> None:
        """Take in what has arrived."""
        try:
            while True:
                for number, command in self._inbox.get(block=wait).commands:
                    self._admit(number, command)
                wait = False
        except Empty:
            return

    def _admit(self, number: int, command: Command) -> None:
        """Samples join at once, except behind a command that makes or changes their adapter; they are cancelled at
        once."""
        if isinstance(command, CancelSample):
            self._cancel(number, command.sample_id)
            return
        if isinstance(command, CheckCustomLoss):
            self._check(number, command)
            return
        if isinstance(command, Sample) and not self._is_touched(command.adapter_id):
            self._join(number, command)
            return
        try:
            self._waiting.append(_Waiting(number, command, _num_rows(command)))
        except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
            self._reply(number, engine_error(error, type(command).__name__))

    def _check(self, number: int, command: CheckCustomLoss) -> None:
        try:
            read_program(command.loss)
        except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
            self._reply(number, engine_error(error, CheckCustomLoss.__name__))
        else:
            self._reply(number, None)

    def _is_touched(self, adapter_id: str | None) -> bool:
        return adapter_id is not None and any(adapter_id in _adapter_ids(item.command) for item in self._waiting)

    def _next(self) -> list[_Waiting]:
        """Take out the first command and, if it is a loss or an optimizer step, those of its kind that can be computed
        with it, of whatever batch. None passes another of its adapter. Losses are as many as fit a pass, and its
        memory."""
        self._bring_ahead()
        due: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        barred: set[str | None] = set()  # adapters of which no more may join
        num_rows, share = 0, 0.0
        for item in self._waiting:
            ids = _adapter_ids(item.command)
            of_memory = self._share_of_pass(item)
            joins = not due or (
                isinstance(item.command, RunLoss | OptimStep)
                and type(item.command) is type(due[0].command)
                and num_rows + item.num_rows <= self._pass_tokens
                and share + of_memory <= 1
                and barred.isdisjoint(ids)
            )
            (due if joins else left).append(item)
            if joins:
                num_rows += item.num_rows
                share += of_memory
            if not joins or isinstance(item.command, OptimStep):
                barred.update(ids)
        self._waiting = left
        return due

    def _bring_ahead(self) -> None:
        """Losses that go ahead come before all that waits of other adapters."""
        first: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        barred: set[str | None] = set()
        for item in self._waiting:
            ids = _adapter_ids(item.command)
            goes_ahead = isinstance(item.command, RunLoss) and item.command.ahead and barred.isdisjoint(ids)
            (first if goes_ahead else left).append(item)
            if not goes_ahead:
                barred.update(ids)
        left.extendleft(reversed(first))
        self._waiting = left

    def _share_of_pass(self, item: _Waiting) -> float:
        return self._adapters.share_of_pass(item.command, item.num_rows) if isinstance(item.command, RunLoss) else 0.0

    def _reply(self, number: int, result: object) -> None:
        self._send(Reply(number, result))

    # --- sampling -----------------------------------------------------------------------------------------------------

    @property
    def _is_sampling(self) -> bool:
        return any(sampler.active for sampler in self._samplers)

    def _step(self) -> None:
        for sampler in self._samplers:
            if sampler.active:
                self._deliver(sampler.step())

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        for number, outcome in outcomes:
            assert isinstance(number, int)
            self._reply(number, outcome)

    def _sample_as_long(self) -> None:
        """Sample for as long as the pass took that has just ended, times its share, or until nobody wants any."""
        now = time.monotonic()
        until = now + (now - self._pass_began) * self._sampling_share
        self._collect(wait=False)
        while self._is_sampling:
            self._step()
            self._collect(wait=False)
            if time.monotonic() >= until:
                break
        self._pass_began = time.monotonic()

    def _join(self, number: int, command: Sample) -> None:
        try:
            model, adapter = self._adapters.base_model(command.base_model), None
            if command.adapter_id is not None:
                adapter = self._adapters.for_sampling(command.adapter_id, command.base_model)
            model.sampler.add(number, command, adapter)
        except TuftError as error:
            self._reply(number, error)

    def _cancel(self, number: int, sample_id: str) -> None:
        for item in list(self._waiting):
            if isinstance(item.command, Sample) and item.command.sample_id == sample_id:
                self._waiting.remove(item)
                self._reply(item.number, cancelled())
        for sampler in self._samplers:
            self._deliver(sampler.cancel(sample_id))
        self._reply(number, None)

    # --- training and adapters ----------------------------------------------------------------------------------------

    def _compute(self, due: Sequence[_Waiting]) -> None:
        losses = {item.number: item.command for item in due if isinstance(item.command, RunLoss)}
        self._sampling_share = max((loss.sampling_share for loss in losses.values()), default=1.0)
        steps = {item.number: item.command for item in due if isinstance(item.command, OptimStep)}
        if losses:
            self._run_losses(losses)
        elif steps:
            self._run_steps(steps)
        else:
            (item,) = due
            if isinstance(item.command, Sample):
                self._join(item.number, item.command)
            elif not isinstance(item.command, RunLoss | OptimStep | CancelSample | CheckCustomLoss):
                self._reply(item.number, self._result(item.command))

    def _run_losses(self, losses: Mapping[int, RunLoss]) -> None:
        """One pass a base model."""
        of_model: defaultdict[str, dict[int, RunLoss]] = defaultdict(dict)
        for number, loss in losses.items():
            try:
                of_model[self._adapters.get(loss.adapter_id).model.info.name][number] = loss
            except TuftError as error:
                self._reply(number, error)
        for index, (name, parts) in enumerate(of_model.items()):
            if index:
                self._sample_as_long()
            unanswered = set(parts)
            try:
                for number, result in self._loss_results(self._adapters.base_model(name), parts):
                    unanswered.remove(number)
                    self._reply(number, result)
            except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
                for number in unanswered:
                    self._reply(number, engine_error(error, "loss"))

    def _loss_results(self, model: LoadedModel, parts: Mapping[int, RunLoss]) -> Iterator[tuple[int, object]]:
        adapters = {part.adapter_id: self._adapters.get(part.adapter_id).adapter for part in parts.values()}
        numbers = list(parts)
        for index, result in model.trainer.run(list(parts.values()), adapters, self._sample_as_long):
            yield numbers[index], result

    def _run_steps(self, steps: Mapping[int, OptimStep]) -> None:
        due: dict[int, tuple[Adapter, OptimizerParams]] = {}
        for number, step in steps.items():
            try:
                due[number] = self._adapters.trainable(step.adapter_id), step.params
            except TuftError as error:
                self._reply(number, error)
        results: Sequence[object]
        try:
            results = optim_steps(list(due.values()))
        except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
            results = [engine_error(error, OptimStep.__name__)] * len(due)
        for number, result in zip(due, results, strict=True):
            self._reply(number, result)

    def _result(self, command: AdapterCommand) -> object:
        try:
            return self._adapters.execute(command)
        except Exception as error:  # noqa: BLE001 (a command's fault is its reply; the engine goes on)
            return engine_error(error, type(command).__name__)


def _adapter_ids(command: Command) -> tuple[str | None, ...]:
    """The adapters that a command reads or changes."""
    match command:
        case CopyAdapter():
            return command.source_id, command.adapter_id
        case CancelSample() | CheckCustomLoss():
            return ()
    return (command.adapter_id,)


def _num_rows(command: Command) -> int:
    if isinstance(command, OptimStep) and isinstance(command.params, DimuonParams):
        return _MORE_THAN_A_PASS
    if not isinstance(command, RunLoss):
        return 0
    return command.num_tokens - sum(shared_with_previous([datum.tokens_T for datum in command.data]))
