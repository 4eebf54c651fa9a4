"""How fast this machine trains a base model, measured by an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from tuft.app import start_engine
from tuft.config import Config
from tuft.engine.base import CreateAdapter, OptimStep, RunLoss
from tuft.types import AdamParams, Datum, LoraSpec

_ADAPTER = "calibration"


def measure_pace(
    config: Config, base_model: str, spec: LoraSpec, inputs: Sequence[Sequence[int]], batch_size: int, for_s: float
) -> float:
    """Tokens a second of training steps on data of these tokens, for about ``for_s`` seconds after the first step.
    Raises ConfigError or ModelError like ``tuft launch``."""
    engine = start_engine(config)
    try:
        engine.wait_ready()
        engine.submit([CreateAdapter(_ADAPTER, base_model, spec)])[0].result()
        num_tokens, started_s = 0, 0.0
        for number, first in enumerate(cycle(range(0, len(inputs), batch_size))):
            batch = inputs[first : first + batch_size]
            replies = [engine.submit([part])[0] for part in _parts(batch, engine.pass_tokens)]
            replies += engine.submit([OptimStep(_ADAPTER, AdamParams())])
            for reply in replies:
                reply.result()
            if number == 0:  # it also makes what later steps find
                started_s = time.monotonic()
                continue
            num_tokens += sum(len(tokens) for tokens in batch)
            if time.monotonic() - started_s >= for_s:
                break
        return num_tokens / (time.monotonic() - started_s)
    finally:
        engine.close()


def _parts(batch: Sequence[Sequence[int]], pass_tokens: int) -> Iterator[RunLoss]:
    """The batch in passes, each as an operation of its own."""
    data: list[Datum] = []
    for tokens in batch:
        if data and sum(datum.num_tokens for datum in data) + len(tokens) > pass_tokens:
            yield RunLoss(_ADAPTER, tuple(data), "cross_entropy")
            data = []
        ids_T = np.asarray(tokens, dtype=np.int64)
        data.append(Datum(ids_T, {"target_tokens": np.roll(ids_T, -1)}))
    yield RunLoss(_ADAPTER, tuple(data), "cross_entropy")
