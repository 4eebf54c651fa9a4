"""`tuft estimate`, as it is typed: its tokens are those that transformers makes of the chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.cli.conftest import Tuft
from tests.conftest import TINY_MODEL, tiny_config
from tuft.app import open_store
from tuft.config import load_config
from tuft.errors import InvalidInput
from tuft.models.chat_template import ChatTemplate
from tuft.store.paces import PaceTable

CHATS = Path(__file__).parents[2] / "examples" / "chat_sft" / "data" / "lighthouse_test.jsonl"


@pytest.fixture
def config_file(tiny_model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tuft.toml"
    prices = f'[prices]\ntrain = 2.0\ncurrency = "EUR"\n[prices.models."{TINY_MODEL}"]\ntrain = 3.0\n'
    file.write_text(tiny_config(tiny_model, prices))
    return file


def estimate(tuft: Tuft, config: Path, dataset: Path, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tuft("estimate", str(dataset), "--config", str(config), "--json", *words))
    return found


def messages() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in CHATS.read_text().splitlines() if line.strip()]


def test_the_tokens_are_those_of_the_models_own_template(tuft: Tuft, config_file: Path, tmp_path: Path) -> None:
    told = estimate(tuft, config_file, CHATS, "--epochs", "3", "--batch-size", "4", "--rank", "2")
    (directory,) = (tmp_path / "tokenizers").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lengths = [len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)) - 1 for chat in messages()]
    assert told["num_tokens_per_epoch"] == sum(lengths)
    assert told["num_tokens"] == 3 * sum(lengths)
    assert told["longest_tokens"] == max(lengths)
    assert told["num_steps"] == -(-3 * len(lengths) // 4)
    assert (told["cost"], told["currency"]) == (pytest.approx(3 * sum(lengths) * 3.0 / 1e6), "EUR")
    assert told["adapter_bytes"] == 16 * told["adapter_parameters"]


def test_a_template_writes_what_transformers_writes(tiny_model: Path) -> None:
    template, tokenizer = ChatTemplate(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for chat in messages()[:8]:
        for prompt in (False, True):
            expected = tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
            assert template.tokens(chat, add_generation_prompt=prompt) == expected


def test_long_chats_are_cut_and_those_without_an_answer_that_early_are_left_out(
    tuft: Tuft, config_file: Path, tmp_path: Path
) -> None:
    whole = estimate(tuft, config_file, CHATS)
    told = estimate(tuft, config_file, CHATS, "--max-tokens", str(whole["longest_tokens"] // 2))
    assert told["longest_tokens"] <= whole["longest_tokens"] // 2
    assert told["num_cut"] > 0
    assert told["num_tokens"] < whole["num_tokens"]
    with pytest.raises(InvalidInput, match="max_tokens: got 1; no conversation has an answer that early"):
        estimate(tuft, config_file, CHATS, "--max-tokens", "1")


def test_the_time_is_from_the_pace_that_is_given_or_that_a_server_measured_and_says_which(
    tuft: Tuft, config_file: Path, tmp_path: Path
) -> None:
    unknown = estimate(tuft, config_file, CHATS)
    assert unknown["seconds"] is None
    assert "--calibrate" in unknown["tokens_per_s_origin"]
    given = estimate(tuft, config_file, CHATS, "--tokens-per-s", "100")
    assert (given["seconds"], given["tokens_per_s_origin"]) == (given["num_tokens"] / 100, "given")
    database = open_store(load_config(config_file, home=tmp_path))
    PaceTable(database).put(TINY_MODEL, 1000, 4000)
    database.close()
    measured = estimate(tuft, config_file, CHATS)
    assert measured["tokens_per_s"] == 250
    assert "measured by the server" in measured["tokens_per_s_origin"]


def test_the_pace_can_be_measured_here(tuft: Tuft, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuft.cli.estimate._CALIBRATE_S", 0.2)
    monkeypatch.setenv("TUFT_ENGINE__COMPILED_KERNELS", "false")
    told = estimate(tuft, config_file, CHATS, "--calibrate", "--rank", "2")
    assert told["tokens_per_s"] > 0
    assert told["tokens_per_s_origin"] == "measured here just now"
    shown = tuft("estimate", str(CHATS), "--config", str(config_file), "--tokens-per-s", "1")
    assert "tokens/s, given" in shown


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: got .*is not JSON"),
        ("[]", "line 1: messages: .*must be a list"),
        ('{"messages": [{"role": "king", "content": "x"}]}', r"line 1: messages\[0\].role: got 'king'"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"line 1: messages\[0\].content: .*not empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must hold an answer"),
        ("", "holds no conversation"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused_by_line_and_field(
    tuft: Tuft, config_file: Path, tmp_path: Path, line: str, problem: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(line)
    with pytest.raises(InvalidInput, match=problem):
        estimate(tuft, config_file, file)
    with pytest.raises(InvalidInput, match="base_model: got 'other'; must be one of"):
        estimate(tuft, config_file, CHATS, "--base-model", "other")
