"""Compiled kernels for the decoders on a CPU: waited for, or put in place between two passes once they are there."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from tuft.errors import EngineError
from tuft.models.decoder import Decoder
from tuft.models.kernels.build import Build, load

_LOOK_EVERY_S = 1.0
_WAIT_S = 0.1
_log = logging.getLogger(__name__)


class KernelUpgrade:
    """Decoders compute with torch's operators until kernels are ready: at once if the directory ``cache`` has them,
    else as soon as another process has compiled them. If that fails they go on as they are, and a warning says why.
    ``cache`` None wants no kernels. ``wait``: until kernels are there, or cannot be: kernels and torch's operators
    differ in the last digits, so a run would get other bits before the change than after it."""

    def __init__(self, decoders: Sequence[Decoder], cache: str | None, wait: bool) -> None:
        self._decoders = [decoder for decoder in decoders if decoder.device.type == "cpu"]
        self._cache = Path(cache or "")
        self._build: Build | None = None
        self._wait = wait
        self._next_look = 0.0
        if self._decoders and cache is not None:
            self._try_upgrade()
        if wait and self.is_pending:
            _log.warning(
                "compiling CPU kernels, once for this machine and version: about a minute. Nothing is computed before, "
                "so that runs get the same bits ever after; engine.deterministic = false does not wait"
            )
            while self.is_pending:
                time.sleep(_WAIT_S)
                self._try_upgrade()

    @property
    def is_pending(self) -> bool:
        return self._build is not None

    def poll(self) -> None:
        """To be called between passes; costs nothing most of the time."""
        if self.is_pending and time.monotonic() >= self._next_look:
            self._try_upgrade()

    def _try_upgrade(self) -> None:
        try:
            self._build = self._build or Build(self._cache, in_background=not self._wait)
            if not self._build.ready():
                self._next_look = time.monotonic() + _LOOK_EVERY_S
                return
            ops = load(self._cache)
        except EngineError as error:
            self._build = None
            _log.warning("%s. Computing with torch's operators, which are slower", error)
            return
        self._build = None
        for decoder in self._decoders:
            decoder.ops = ops
