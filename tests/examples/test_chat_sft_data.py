"""Chats by name, the split, the batches, and what is shipped with the example."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from answers import held_out_prompts
from chat_sft import batches, num_steps
from conversations import DATA_DIR, DatasetError, load_chats, parse_messages, read_jsonl
from render import to_data
from settings import Settings, parse_settings

CLOSING = "Steady as she glows."


def rows(count: int) -> str:
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(count)]
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in chats)


def test_a_local_file_is_split_once_and_reproducibly(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(rows(50) + "\n")

    first = load_chats(str(file), num_test=8, max_train=None, seed=3)
    second = load_chats(str(file), num_test=8, max_train=None, seed=3)

    assert (len(first.train), len(first.test)) == (42, 8)
    assert first == second
    assert sorted(m[0]["content"] for m in first.train + first.test) == sorted(f"q{i}" for i in range(50))
    assert first.origin == "a local file"


def test_without_a_hub_the_default_is_the_shipped_set_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there

    chosen = load_chats(None, num_test=32, max_train=None, seed=0)

    assert chosen.name == "lighthouse"
    assert "no_robots was not used: " in chosen.origin


def test_a_set_that_was_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(DatasetError, match=r"some/set: .*--dataset lighthouse"):
        load_chats("some/set", num_test=32, max_train=None, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: not JSON"),
        ('{"text": "hi"}', r"line 1: 'messages' must be a list"),
        ('{"messages": []}', r"line 1: 'messages' must be a list"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', r"messages\[0\].role: got 'bot'; must be one of system"),
        ('{"messages": [{"role": "user", "content": "  "}]}', r"messages\[0\].content: got '  '; must be text"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', r"no message has the role 'assistant'"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")

    with pytest.raises(DatasetError, match=message):
        read_jsonl(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.jsonl: No such file"):
        load_chats(str(tmp_path / "absent.jsonl"), num_test=1, max_train=None, seed=0)


def test_contents_are_stripped() -> None:
    messages = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "\n\nhello "}]

    assert [m["content"] for m in parse_messages({"messages": messages}, "here")] == ["hi", "hello"]


def test_an_epoch_gives_every_conversation_once() -> None:
    options = Settings(epochs=2, batch_size=5, seed=1)

    drawn = list(batches(list(range(25)), options))  # type: ignore[arg-type]  # any sequence can be batched

    assert len(drawn) == num_steps(options, 25) == 10
    assert sorted(x for batch in drawn[:5] for x in batch) == list(range(25))
    assert sorted(x for batch in drawn[5:] for x in batch) == list(range(25))
    assert drawn[:5] != drawn[5:]


def test_steps_win_over_epochs_and_without_either_there_are_a_hundred() -> None:
    assert num_steps(Settings(steps=7, epochs=2), num_train=80) == 7
    assert num_steps(Settings(epochs=0.001), num_train=80) == 1
    assert num_steps(Settings(), num_train=80) == 100


def test_batches_larger_than_the_set_are_still_full() -> None:
    drawn = list(batches([1, 2, 3], Settings(steps=2, batch_size=8)))  # type: ignore[list-item]

    assert [len(batch) for batch in drawn] == [8, 8]


def test_the_shipped_chats_are_one_voice_and_no_two_are_alike(smollm2: Any) -> None:
    train, test = (read_jsonl(DATA_DIR / f"lighthouse_{part}.jsonl") for part in ("train", "test"))
    questions = Counter(m["content"] for chat in train + test for m in chat if m["role"] == "user")
    answers = [m["content"] for chat in train + test for m in chat if m["role"] == "assistant"]

    assert len(train) >= 240
    assert len(test) == 32
    assert max(questions.values()) == 1
    assert len(set(answers)) == len(answers)
    assert all(answer.endswith(" " + CLOSING) for answer in answers)
    assert {len([m for m in chat if m["role"] == "assistant"]) for chat in train} >= {1, 2}
    assert any(chat[0]["role"] == "system" for chat in train)
    assert max(datum.model_input.length for datum in to_data(smollm2, train + test, 4096)) <= 512


def test_a_count_below_one_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--api-key", "tml-x", "--eval-every", "0"])

    assert raised.value.code == 2
    assert "--eval-every: got 0; must be at least 1" in capsys.readouterr().err


def test_held_out_prompts_end_before_the_first_answer() -> None:
    dataset = load_chats("lighthouse", num_test=32, max_train=None, seed=0)

    prompts = held_out_prompts(dataset)

    assert len(prompts) == 3
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert not any(prompt == chat[: len(prompt)] for prompt in prompts for chat in dataset.train)


def test_the_command_line_needs_a_key_and_takes_it_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(SystemExit) as raised:
        parse_settings([])
    assert raised.value.code == 2
    assert "TINKER_API_KEY" in capsys.readouterr().err

    monkeypatch.setenv("TINKER_API_KEY", "tml-from-env")
    assert parse_settings([]).api_key == "tml-from-env"
    assert parse_settings(["--api-key", "tml-given"]).api_key == "tml-given"
    assert os.environ["TINKER_API_KEY"] == "tml-from-env"
