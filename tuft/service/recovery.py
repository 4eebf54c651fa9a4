"""What an earlier server had acknowledged and not done is taken up again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuft.errors import RunLost, StorageError
from tuft.records import FutureKind, JournaledFuture
from tuft.service.calls import Rejected
from tuft.service.custom_losses import CustomLosses
from tuft.service.futures import Futures
from tuft.service.queue import Operation
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.settlements import failure
from tuft.store.journal import Journal
from tuft.store.spool import INLINE_BYTES

_LOSSES = ("forward_backward", "forward")


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much was taken up."""

    num_runs: int
    num_operations: int
    num_samples: int


class Recovery:
    """Works once, at start, before anything is accepted."""

    def __init__(
        self, journal: Journal, futures: Futures, runs: Runs, samplers: Samplers, custom_losses: CustomLosses
    ) -> None:
        self._journal = journal
        self._futures = futures
        self._runs = runs
        self._samplers = samplers
        self._custom_losses = custom_losses

    async def recover(self) -> Recovered:
        """Everything that is pending has its place again. Raises StorageError if the journal cannot be read."""
        pending: defaultdict[FutureKind, list[JournaledFuture]] = defaultdict(list)
        for known in self._futures.start():
            pending[known.key.kind].append(known)
        operations: defaultdict[str, list[Operation]] = defaultdict(list)
        for known in sorted(pending["operation"], key=lambda known: known.key.seq):
            operations[known.key.subject_id].append(await self._operation(known))
        num_runs = self._runs.resume(pending["unload"], operations)
        self._end_late(operations)
        await self._custom_losses.resume(pending["custom_loss"])
        num_samples = await self._samplers.resume(self._journal.kept("sample"))
        return Recovered(num_runs, len(pending["operation"]), num_samples)

    def _end_late(self, operations: Mapping[str, Sequence[Operation]]) -> None:
        """Those of runs that had ended: the server died before it could say so."""
        for run_id, waiting in operations.items():
            try:
                self._runs.open_one(run_id)
            except RunLost as error:
                for operation in waiting:
                    self._futures.settle(operation.future_id, failure(error))

    async def _operation(self, known: JournaledFuture) -> Operation:
        """A large loss stays on the disk until its turn."""
        operation = Operation(
            run_id=known.key.subject_id,
            tenant_id=known.tenant_id,
            seq=known.key.seq,
            future_id=known.future_id,
            work=None,
            num_rows=known.num_rows,
            num_tokens=known.charge.num_tokens,
            name=known.name,
            key_number=known.key_number,
        )
        if known.name not in _LOSSES or known.request_bytes <= INLINE_BYTES:
            try:
                operation.work = await self._futures.request(known.future_id)
            except StorageError as error:  # this one fails, the others go on
                operation.work = Rejected(error.told, "server")
        return operation
