"""Older SDKs, unmodified, each installed apart from the others and run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_MODEL, LiveServer

SCRIPT = """
import sys, tinker
from importlib.metadata import version
from tinker import types
client = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
training = client.create_lora_training_client(base_model=sys.argv[3], rank=4, seed=1)
tokens = [5, 17, 80, 33, 150, 42, 7, 99]
datum = types.Datum(
    model_input=types.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[7]),
        "weights": types.TensorData(data=[1.0] * 7, dtype="float32", shape=[7]),
    },
)
losses = []
for _ in range(20):
    backward = training.forward_backward([datum], "cross_entropy")
    update = training.optim_step(types.AdamParams(learning_rate=1e-2))
    losses.append(backward.result().metrics["loss:sum"])
    update.result()
assert losses[-1] < 0.5 * losses[0], losses
forward = training.forward([datum], "cross_entropy").result()
assert len(forward.loss_fn_outputs[0]["logprobs"].data) == 7
path = training.save_state("old").result().path
training.load_state(path).result()
sampler = training.save_weights_and_get_sampling_client("old")
params = types.SamplingParams(max_tokens=3, temperature=0.0)
result = sampler.sample(types.ModelInput.from_ints(tokens[:4]), num_samples=2, sampling_params=params).result()
assert [len(sequence.tokens) for sequence in result.sequences] == [3, 3]
logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
assert logprobs[0] is None and len(logprobs) == 8
print(version("tinker"), "ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sdk", ["0.6.0", "0.16.1", "0.22.7", "0.30.4"])
def test_an_older_sdk_completes_the_loop(tiny_server: LiveServer, tmp_path: Path, sdk: str) -> None:
    target = tmp_path / "sdk"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*install, f"tinker=={sdk}"], check=True, timeout=180, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "TINKER_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tiny_server.url, tiny_server.key, TINY_MODEL],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{sdk} ok")
