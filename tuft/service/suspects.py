"""Operations that engines died with, beside others: each is tried alone, which tells the innocent from the guilty."""

from __future__ import annotations

from collections.abc import Callable

from tuft.service.queue import Operation


class Suspects:
    """``could_start``: whether all that an operation needs is there; ``num_under_way``: what is with the engine."""

    def __init__(self, could_start: Callable[[Operation], bool], num_under_way: Callable[[], int]) -> None:
        self._could_start = could_start
        self._num_under_way = num_under_way
        self._suspects: dict[str, Operation] = {}
        self._alone: Operation | None = None

    def add(self, operation: Operation) -> None:
        self._suspects[operation.future_id] = operation

    def discard(self, operation: Operation) -> None:
        self._suspects.pop(operation.future_id, None)

    def first(self) -> Operation | None:
        """Of those that could start now."""
        return next(filter(self._could_start, self._suspects.values()), None)

    def may_start(self, operation: Operation) -> bool:
        """While there are suspects: one of them at a time, with what its run does before it, each alone."""
        first = self.first()
        if first is None:
            return True
        if operation.run_id != first.run_id or operation.seq > first.seq:
            return False
        if self._alone is None and not self._num_under_way():
            self._alone = operation
        return self._alone is operation

    def answered(self, num_with_engine: int) -> None:
        """So many are with the engine still."""
        if not num_with_engine:
            self._alone = None
