"""Recipes of tinker-cookbook, unmodified, run as its readers run them: `python -m tinker_cookbook.recipes...`.

The working directory shadows the hub: what a recipe names `org/name` is a local directory there. The cookbook needs an
older transformers than ours, hence an environment of its own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launch, LiveServer, with_kernels
from tests.sdk.venvs import venv_python
from tuft.embedded import EMBEDDED_NAME, find_embedded

COOKBOOK = "tinker-cookbook[math-rl]==0.5.8"
FLOAT32 = "Qwen/Qwen3-4B-Instruct-2507"
BF16 = "Qwen/Qwen3-30B-A3B-Instruct-2507"
"""Names that the cookbook knows, both of the embedded SmolLM2: its chat template has the marks of Qwen's."""

TALK = (
    ("Where do ships sleep?", "In the harbour, under the lighthouse."),
    ("Who counts the waves?", "The keeper counts the waves."),
    ("What does the fog eat?", "The fog eats the horizon."),
    ("When does the tide turn?", "The tide turns at noon."),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first one installs the cookbook


@pytest.fixture(scope="module")
def server(launch: Launch, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """The embedded model twice: in float32 under an alias, in bf16 under a name of its own."""
    file = find_embedded()
    return launch(
        with_kernels(tmp_path_factory.mktemp("home"), kernels),
        config=f"""
[[base_models]]
name = "{EMBEDDED_NAME}"
path = "{file}"
aliases = ["{FLOAT32}"]
precision = "float32"

[[base_models]]
name = "{BF16}"
path = "{file}"
precision = "bf16"
""",
    )


class Workplace:
    """A directory where recipes run, and what their environment says."""

    def __init__(self, directory: Path, server: LiveServer) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TINKER_"))},
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": server.key,
            "TINKER_TELEMETRY": "0",
            "HF_HOME": str(directory / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def write(self, file: str, rows: list[dict[str, Any]]) -> None:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, name: str, **options: object) -> list[dict[str, Any]]:
        """Run it; returns the metrics it logged, one record a step."""
        arguments = {"renderer_name": "qwen3_instruct", "log_path": self.log, **options}
        done = subprocess.run(
            [
                venv_python("tinker-cookbook", COOKBOOK),
                "-m",
                f"tinker_cookbook.recipes.{name}",
                *(f"{option}={value}" for option, value in arguments.items()),
            ],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        checkpoints = self.log / "checkpoints.jsonl"
        is_complete = checkpoints.exists() and '"final"' in checkpoints.read_text()
        # now and then one of its libraries aborts when the interpreter ends, after all is done and written
        allowed = (0, -signal.SIGABRT) if is_complete else (0,)
        assert done.returncode in allowed, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return [json.loads(line) for line in (self.log / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, server: LiveServer) -> Workplace:
    """With the tokenizer that the server wrote, under the name the recipes ask for."""
    tokenizer = server.home / "tokenizers" / EMBEDDED_NAME.replace("/", "--")
    shutil.copytree(tokenizer, tmp_path / FLOAT32)
    return Workplace(tmp_path, server)


def test_chat_sl_learns_and_resumes_from_its_last_checkpoint(workplace: Workplace) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TALK
    ]
    workplace.write("HuggingFaceH4/no_robots/train.jsonl", rows * 4)
    workplace.write("HuggingFaceH4/no_robots/test.jsonl", rows)
    options = {
        "model_name": FLOAT32,
        "dataset": "no_robots",
        "batch_size": 4,
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "save_every": 2,
        "eval_every": 2,
    }
    first = workplace.recipe("chat_sl.train", **options)
    assert [found["step"] for found in first] == [0, 1, 2, 3]
    assert [found["step:max"] for found in first] == [1, 2, 3, 4]
    assert first[3]["train_mean_nll"] < 0.8 * first[0]["train_mean_nll"]
    assert first[2]["test/nll"] < first[0]["test/nll"]

    checkpoints = workplace.log / "checkpoints.jsonl"
    lines = checkpoints.read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["000002", "final"]
    checkpoints.write_text(lines[0] + "\n")  # as if it had been interrupted: a final checkpoint ends the training
    resumed = workplace.recipe("chat_sl.train", behavior_if_log_dir_exists="resume", **options)[len(first) :]
    assert [found["step"] for found in resumed] == [2, 3]
    # the recipe is one batch ahead of what it waits for: its checkpoint of step 2 holds the update of step 3, too
    assert [found["step:max"] for found in resumed] == [5, 6]
    assert resumed[0]["train_mean_nll"] < first[2]["train_mean_nll"]


@pytest.mark.parametrize(
    ("model", "groups", "largest_kl"),
    [
        pytest.param(FLOAT32, 2, 1e-4, id="float32"),
        pytest.param(BF16, 4, 5e-3, id="bf16"),  # more tokens: one differs by about 0.02, their mean must not
    ],
)
def test_math_rl_trains_on_what_was_sampled_at_the_probability_it_had(
    workplace: Workplace, server: LiveServer, model: str, groups: int, largest_kl: float
) -> None:
    if model == BF16:  # this tokenizer comes from the server, which stands in for the hub
        del workplace.environment["HF_HUB_OFFLINE"]
        workplace.environment["HF_ENDPOINT"] = server.url
    metrics = workplace.recipe(
        "math_rl.train",
        model_name=model,
        env="arithmetic",
        groups_per_batch=groups,
        group_size=8,
        max_tokens=6,
        lora_rank=4,
        learning_rate=1e-4,
        max_steps=2,
        eval_every=0,
        save_every=0,
    )
    assert [found["step:max"] for found in metrics] == [1, 2]
    kl = [found["optim/kl_sample_train_v1"] for found in metrics]
    assert abs(sum(kl) / len(kl)) < largest_kl, kl
    assert all(found["optim/kl_sample_train_v2"] < largest_kl for found in metrics)


def test_dpo_starts_at_ln_2_and_learns_the_preference(workplace: Workplace) -> None:
    pairs = [
        {
            "chosen": f"\n\nHuman: {question}\n\nAssistant: {answer}",
            "rejected": f"\n\nHuman: {question}\n\nAssistant: I will not say.",
        }
        for question, answer in TALK
    ]
    workplace.write("Anthropic/hh-rlhf/train.jsonl", pairs)
    workplace.write("Anthropic/hh-rlhf/test.jsonl", pairs[:2])
    metrics = workplace.recipe(
        "preference.dpo.train", model_name=FLOAT32, dataset="hhh", batch_size=2, learning_rate=1e-3
    )
    assert [found["step"] for found in metrics] == [0, 1]
    assert metrics[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[1]["dpo_loss"] < 0.6
    assert metrics[1]["accuracy"] == 1
