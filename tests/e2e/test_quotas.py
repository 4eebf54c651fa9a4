"""A tenant at its cap, through the real SDK: it says why, waits, and the same loop goes on when the cap is lifted."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, TUFT, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import TOKENS, datum
from tuft.records import now

CHATS = Path(__file__).parents[2] / "examples" / "chat_sft" / "data" / "lighthouse_test.jsonl"
NUM_TOKENS = len(TOKENS) - 1
PRICE = 1e6  # so that a token costs one


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> LiveServer:
    return launch(config=tiny_config(tiny_model, f"[prices]\ntrain = {PRICE}\n"))


@pytest.fixture
def tenant() -> str:
    """One of the test's own."""
    return f"tenant-{token_hex(4)}"


@pytest.fixture
def client(server: LiveServer, tenant: str) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=server.create_key(tenant))
    yield client
    client.close("success").result()


def tuft(server: LiveServer, *words: str) -> str:
    command = [TUFT, *words, "--home", str(server.home), "--config", str(server.home / "tuft.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def allow(server: LiveServer, tenant: str, option: str, value: str) -> None:
    """Until the server knows."""
    tuft(server, "quota", "set", "--tenant", tenant, option, value)
    time.sleep(1.1)


def spent(server: LiveServer, tenant: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tuft(server, "usage", "--tenant", tenant, "--by", "tenant", "--json"))
    (row,) = found["rows"]
    return dict(row)


class Told(logging.Handler):
    """Calls ``then`` once, when the SDK has printed a warning with these words."""

    def __init__(self, words: str, then: Any) -> None:
        super().__init__(logging.WARNING)
        self.words, self.then, self.texts = words, then, []  # type: ignore[var-annotated]

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if self.words in text:
            self.texts.append(text)
            if len(self.texts) == 1:
                threading.Thread(target=self.then).start()


def test_a_loop_at_its_spend_cap_is_told_why_and_goes_on_when_it_is_lifted(
    server: LiveServer, client: tinker.ServiceClient, tenant: str
) -> None:
    allow(server, tenant, "--spend-total", str(2.5 * NUM_TOKENS))
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    told = Told("spend_total", lambda: allow(server, tenant, "--spend-total", "none"))
    logging.getLogger("tinker").addHandler(told)
    try:
        for _ in range(4):
            loss = training.forward_backward([datum()], "cross_entropy")
            training.optim_step(types.AdamParams()).result()
            assert loss.result().metrics["loss:sum"] > 0
    finally:
        logging.getLogger("tinker").removeHandler(told)
    assert "The job is paused due to billing status. Error: Error code: 402" in told.texts[0]
    assert f"tenant {tenant} has used {2 * NUM_TOKENS} USD" in told.texts[0]
    assert f"the tenant's quota is {2.5 * NUM_TOKENS:g} USD" in told.texts[0]
    assert spent(server, tenant) == {"tenant": tenant, "tokens": 4 * NUM_TOKENS, "cost": 4.0 * NUM_TOKENS}


def test_a_sampler_at_its_tokens_of_the_day_pauses_and_goes_on(
    server: LiveServer, client: tinker.ServiceClient, tenant: str
) -> None:
    sampler = client.create_sampling_client(base_model=TINY_MODEL).result()
    allow(server, tenant, "--tokens-per-day", "0")
    told = Told("tokens_per_day", lambda: allow(server, tenant, "--tokens-per-day", "1e6"))
    logging.getLogger("tinker").addHandler(told)
    try:
        params = types.SamplingParams(max_tokens=3, stop=[])
        answer = sampler.sample(types.ModelInput.from_ints(TOKENS), 1, params).result()
    finally:
        logging.getLogger("tinker").removeHandler(told)
    assert len(answer.sequences[0].tokens) == 3
    assert "the tenant's quota is 0 tokens" in told.texts[0]


def test_a_run_too_many_is_an_error_at_once_that_says_what_makes_room(
    server: LiveServer, client: tinker.ServiceClient, tenant: str
) -> None:
    first = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    allow(server, tenant, "--concurrent-runs", "1")
    with pytest.raises(tinker.RateLimitError, match="concurrent_runs: .* unload a run, or finish a session, first"):
        client.create_lora_training_client(TINY_MODEL, rank=4).result()
    assert first.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0


@pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning")
def test_an_estimate_is_what_the_ledger_says_after_the_run(
    server: LiveServer, client: tinker.ServiceClient, tenant: str
) -> None:
    told = json.loads(tuft(server, "estimate", str(CHATS), "--epochs", "2", "--batch-size", "4", "--json"))
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    tokenizer = training.get_tokenizer()
    data = []
    for line in CHATS.read_text().splitlines():
        tokens = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=False)
        targets = {"target_tokens": tokens[1:]}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=targets))
    for _ in range(2):
        futures = [
            training.forward_backward(data[first : first + 4], "cross_entropy") for first in range(0, len(data), 4)
        ]
        for future in futures:
            future.result()
    row = spent(server, tenant)
    assert row["tokens"] == told["num_tokens"]
    assert row["cost"] == pytest.approx(told["cost"])
    admin = tinker.AdminClient(base_url=server.url, api_key=server.create_key(tenant))
    hour = now().replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result()
    assert sum(event.estimated_cost_usd or 0 for event in usage.data) == pytest.approx(told["cost"])
