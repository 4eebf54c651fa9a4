"""Kill engine and server at random instants of one training run, and compare with the run that nobody disturbed.

The client is the real SDK, which knows of nothing: it submits steps, polls and gets results. Each step is followed by a
kill at a random instant, of engine or server; the server is started again as a supervisor would.

    python -m faults.crash [--kills 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sqlite3
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types
from tqdm import tqdm

from faults.record import Record
from faults.server import Server
from tests.conftest import TINY_MODEL, tiny_config
from tests.models.tiny import make_tiny_model

_SETTINGS = "[journal]\nsnapshot_interval_s = 2.0\n[limits]\nresult_retention_s = 86400\n"  # all are counted at the end
_SAVE_EVERY, _SAMPLE_EVERY = 7, 5
_SPREAD_S = 3.0
"""A kill comes so long after the step that armed it at the latest: the engine is down for about as long."""


@dataclass(frozen=True)
class Told:
    """What the client saw of a run, and what is on the disk at its end."""

    losses: list[float]
    logprobs: bytes
    samples: list[list[int]]
    digest: str
    num_operations: int


def _data(step: int) -> list[types.Datum]:
    randomness = np.random.default_rng(step)
    data = []
    for _ in range(4):
        tokens = randomness.integers(10, 300, int(randomness.integers(8, 60))).tolist()
        inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


class Killer:
    """Kills once for each ``arm``, at a random instant of the next ``_SPREAD_S``, ``num_kills`` times in all."""

    def __init__(self, server: Server, num_kills: int, seed: int) -> None:
        self._server = server
        self._num_kills = num_kills
        self._random = random.Random(seed)
        self._bar = tqdm(total=num_kills, desc="kills", unit="")
        self._thread: threading.Thread | None = None
        self.num_engine = self.num_server = 0

    @property
    def is_done(self) -> bool:
        return self.num_engine + self.num_server >= self._num_kills

    def arm(self) -> None:
        self.wait()
        if not self.is_done:
            self._thread = threading.Thread(target=self._kill)
            self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _kill(self) -> None:
        time.sleep(self._random.uniform(0, _SPREAD_S))
        if self._random.random() < 0.5:
            killed = self._server.kill_engine()  # there may be none at this instant
            self.num_engine += killed
            self._bar.update(killed)
        else:
            self._server.kill()
            self._server.start(wait=False)
            self.num_server += 1
            self._bar.update()


def train(server: Server, num_steps: int | None, killer: Killer | None) -> Told:
    """Each step: forward_backward and optim_step, both submitted before either has ended; now and then a save or a
    sample, submitted with them. ``num_steps`` None: until the killer is done."""
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4, seed=7).result()
    losses, logprobs, samples, num_operations = [], hashlib.sha256(), [], 1
    for step in count():
        if step == num_steps or (killer is not None and killer.is_done):
            break
        if killer is not None:
            killer.arm()
        loss = training.forward_backward(_data(step), "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
        num_operations += 2
        if step % _SAVE_EVERY == 0:
            training.save_state(f"step-{step}").result()
            num_operations += 1
        if step % _SAMPLE_EVERY == 0:
            sampler = training.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=12, seed=step, temperature=1.0)
            sampled = sampler.sample(types.ModelInput.from_ints([20, 30, 40]), 2, params).result()
            samples += [list(sequence.tokens) for sequence in sampled.sequences]
            num_operations += 1
        result = loss.result()
        losses.append(result.metrics["loss:sum"])
        for output in result.loss_fn_outputs:
            logprobs.update(np.asarray(output["logprobs"].data, np.float32).tobytes())
        stepped.result()
    if killer is not None:
        killer.wait()
    path = training.save_state("final").result().path
    return Told(losses, logprobs.digest(), samples, _digest(server.home, path), num_operations + 1)


def _digest(home: Path, path: str) -> str:
    """Of weights, moments and gradients of a checkpoint."""
    run_id, _, name = path.removeprefix("tinker://").split("/")
    (directory,) = home.glob(f"checkpoints/*/{run_id}/{name}-*")
    found = hashlib.sha256()
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        found.update((directory / file).read_bytes())
    return found.hexdigest()


def kills(num_kills: int, seed: int = 0) -> Record:
    """The run that is killed comes first: it tells how many steps the other has to make."""
    os.environ["TINKER_TELEMETRY"] = "0"
    with tempfile.TemporaryDirectory(prefix="tuft-faults-") as directory:
        root = Path(directory)
        config = tiny_config(make_tiny_model("qwen3", root / "model"), _SETTINGS)
        killed, undisturbed = Server(root / "killed", config), Server(root / "undisturbed", config)
        killed.start()
        killer = Killer(killed, num_kills, seed)
        began_s = time.monotonic()
        try:
            seen = train(killed, None, killer)
        finally:
            killer.wait()
            killed.stop()
        elapsed_s = time.monotonic() - began_s
        undisturbed.start()
        try:
            expected = train(undisturbed, len(seen.losses), None)
        finally:
            undisturbed.stop()
        ledger = [_ledger(server.home) for server in (killed, undisturbed)]
        num_results, num_failed = _results(killed.home)
    differing = [name for name in ("losses", "logprobs", "samples", "digest") if _of(seen, name) != _of(expected, name)]
    broken = [f"{name} differ from those of the run that nobody disturbed" for name in differing]
    broken += [] if ledger[0] == ledger[1] else [f"the ledger has {ledger[0]} tokens, not {ledger[1]}"]
    lost = abs(num_results - seen.num_operations) + num_failed
    measured = {
        "engine_kills": float(killer.num_engine),
        "server_kills": float(killer.num_server),
        "operations": float(seen.num_operations),
        "results": float(num_results),
        "elapsed_s": round(elapsed_s, 1),
    }
    return Record("kills of one training run", "SIGKILL of engine or server", num_kills, lost, measured, tuple(broken))


def _of(told: Told, name: str) -> object:
    return getattr(told, name)


def _results(home: Path) -> tuple[int, int]:
    """Operations of the run that have exactly one result, and those that failed."""
    with sqlite3.connect(home / "tuft.sqlite3") as database:
        query = "select count(distinct seq), sum(outcome = 'failed') from futures where kind = 'operation'"
        num_results, num_failed = database.execute(query + " and outcome is not null").fetchone()
    return num_results, num_failed


def _ledger(home: Path) -> dict[str, int]:
    with sqlite3.connect(home / "tuft.sqlite3") as database:
        return dict(database.execute("select kind, sum(quantity) from ledger where kind = 'training' group by kind"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(kills(arguments.kills, arguments.seed))


if __name__ == "__main__":
    main()
