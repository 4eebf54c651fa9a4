"""How much of what waits has its data in memory."""

from __future__ import annotations


class HeldRequests:
    """Requests whose data are in memory while they wait, of up to ``max_bytes``; the others' are on the disk alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}  # bytes, by future
        self._num_bytes = 0

    def hold(self, future_id: str, num_bytes: int) -> bool:
        """False if there is no room for it."""
        if self._num_bytes + num_bytes > self._max_bytes:
            return False
        self._sizes[future_id] = num_bytes
        self._num_bytes += num_bytes
        return True

    def release(self, future_id: str) -> None:
        """It waits no more."""
        self._num_bytes -= self._sizes.pop(future_id, 0)
