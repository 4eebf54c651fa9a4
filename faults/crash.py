"""Kill engine and server at random instants of one training run, and compare with the run that nobody disturbed.

The client is the real SDK, which knows of nothing: it submits steps, polls and gets results. Every step is killed once,
at a random instant after it was submitted: engine or server, the server being started again as a supervisor would.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sqlite3
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

from faults.server import Server
from tests.conftest import TINY_MODEL, tiny_config
from tests.models.tiny import make_tiny_model

_SETTINGS = "[journal]\nsnapshot_interval_s = 2.0\n"
_SAVE_EVERY, _SAMPLE_EVERY = 7, 5


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
    """Kills once for each ``arm``, at a random instant of the next ``spread_s``."""

    def __init__(self, server: Server, seed: int, spread_s: float) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._spread_s = spread_s
        self.num_engine = self.num_server = 0
        self._thread: threading.Thread | None = None

    def arm(self) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _kill(self) -> None:
        time.sleep(self._random.uniform(0, self._spread_s))
        if self._random.random() < 0.5:
            self.num_engine += self._server.kill_engine()
        else:
            self._server.kill()
            self._server.start(wait=False)
            self.num_server += 1


def train(server: Server, num_steps: int, killer: Killer | None) -> Told:
    """Each step: forward_backward and optim_step, both submitted before either has ended; now and then a save or a
    sample, submitted with them."""
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4, seed=7).result()
    losses, logprobs, samples, num_operations = [], hashlib.sha256(), [], 1
    for step in range(num_steps):
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


def journaled(home: Path) -> tuple[int, int, int]:
    """Operations of runs in the journal, those that failed, and trained tokens in the ledger."""
    with sqlite3.connect(home / "tuft.sqlite3") as database:
        query = "select count(*), count(distinct seq) from futures where kind='operation'"
        num_rows, num_seqs = database.execute(query).fetchone()
        assert num_rows == num_seqs
        (num_failed,) = database.execute("select count(*) from futures where outcome='failed'").fetchone()
        (num_tokens,) = database.execute("select sum(quantity) from ledger where kind='training'").fetchone()
    return num_rows, num_failed, num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread-s", type=float, default=3.0, help="a kill comes so long after a step at the latest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        config = tiny_config(make_tiny_model("qwen3", root / "model"), _SETTINGS)
        told: list[Told] = []
        for name in ("undisturbed", "killed"):
            server = Server(root / name, config)
            server.start()
            killer = Killer(server, arguments.seed, arguments.spread_s) if name == "killed" else None
            began = time.monotonic()
            try:
                told.append(train(server, arguments.kills, killer))
            finally:
                if killer is not None:
                    killer.wait()
                server.stop()
            print(f"{name}: {time.monotonic() - began:.0f} s, journal {journaled(server.home)}")
            if killer is not None:
                print(f"killed: engine {killer.num_engine}, server {killer.num_server}")
        expected, seen = told
        print("final adapter equal:", seen.digest == expected.digest)
        for step, (left, right) in enumerate(zip(expected.losses, seen.losses, strict=True)):
            if left != right:
                print(f"loss of step {step}: {left!r}, then {right!r}")
        print("losses equal:", seen.losses == expected.losses, "logprobs equal:", seen.logprobs == expected.logprobs)
        print("samples equal:", seen.samples == expected.samples)


if __name__ == "__main__":
    main()
