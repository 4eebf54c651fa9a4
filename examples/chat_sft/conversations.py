"""Where chats come from: a JSON Lines file, a data set on the Hugging Face hub, or the set shipped with the example.

A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": str}`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render import Message

HUB_DATASET = "HuggingFaceH4/no_robots"
PACKAGED_DATASET = "lighthouse"
DATA_DIR = Path(__file__).parent / "data"
ROLES = ("system", "user", "assistant")


class DatasetError(ValueError):
    """A data set cannot be found or read; the text says what to do."""


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """`origin` says which data these are and why they were chosen."""

    name: str
    origin: str
    train: list[list[Message]]
    test: list[list[Message]]


def load_chats(name: str | None, *, num_test: int, max_train: int | None, seed: int) -> ChatDataset:
    """Load by name: `lighthouse`, a path that ends in .jsonl, or a hub id. None: the hub's no_robots, and where the
    hub cannot serve it the packaged set, with the reason in `origin`. Raises DatasetError."""
    if name is None:
        obstacle = hub_obstacle()
        if obstacle is None:
            return _split(HUB_DATASET, "from the hub (the default)", *_load_hub(HUB_DATASET), num_test, max_train, seed)
        origin = f"shipped with the example; {HUB_DATASET} was not used: {obstacle}"
        return _split(PACKAGED_DATASET, origin, *_load_packaged(), num_test, max_train, seed)
    if name == PACKAGED_DATASET:
        return _split(name, "shipped with the example", *_load_packaged(), num_test, max_train, seed)
    if name.endswith(".jsonl") or Path(name).is_file():
        return _split(name, "a local file", read_jsonl(Path(name)), None, num_test, max_train, seed)
    obstacle = hub_obstacle()
    if obstacle is not None:
        raise DatasetError(f"{name}: {obstacle}. Without the hub: --dataset {PACKAGED_DATASET}, or a .jsonl file")
    return _split(name, "from the hub", *_load_hub(name), num_test, max_train, seed)


def read_jsonl(path: Path) -> list[list[Message]]:
    """One `{"messages": [...]}` a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from error
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}: not JSON: {error}") from error
        conversations.append(parse_messages(row, f"{path}, line {number}"))
    return conversations


def parse_messages(row: Any, where: str) -> list[Message]:
    """The checked messages of one row. Contents are stripped: chat templates put whitespace of their own around them,
    and a leading newline would melt into the template's newline as another token."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise DatasetError(f"{where}: 'messages' must be a list with at least one message")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            raise DatasetError(f"{where}: messages[{index}].role: got {role!r}; must be one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DatasetError(f"{where}: messages[{index}].content: got {content!r}; must be text that is not empty")
        checked.append({"role": role, "content": content.strip()})
    if not any(message["role"] == "assistant" for message in checked):
        raise DatasetError(f"{where}: no message has the role 'assistant', so nothing could be learned from it")
    return checked


def hub_obstacle(timeout_s: float = 4.0) -> str | None:
    """Why no data set can come from the hub just now; None if one can."""
    if importlib.util.find_spec("datasets") is None:
        return "the package 'datasets' is not installed (pip install datasets)"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return None  # the library then reads its cache, or says itself what is missing
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/datasets/{HUB_DATASET}", timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        return f"{endpoint} answered {error.code}: it serves no data sets"
    except OSError as error:
        return f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"


def _load_hub(name: str) -> tuple[list[list[Message]], list[list[Message]] | None]:
    import datasets  # heavy, and only this source needs it

    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, ConnectionError) as error:
        raise DatasetError(f"{name}: {error}") from error
    if "train" not in splits:
        raise DatasetError(f"{name}: no split 'train'; it has {', '.join(splits)}")
    train = _parse_rows(splits["train"], f"{name}, train")
    held_out = next((part for part in ("test", "validation") if part in splits), None)
    return train, None if held_out is None else _parse_rows(splits[held_out], f"{name}, {held_out}")


def _parse_rows(rows: Iterable[Any], where: str) -> list[list[Message]]:
    return [parse_messages(row, f"{where}, row {number}") for number, row in enumerate(rows)]


def _load_packaged() -> tuple[list[list[Message]], list[list[Message]]]:
    return (read_jsonl(DATA_DIR / "lighthouse_train.jsonl"), read_jsonl(DATA_DIR / "lighthouse_test.jsonl"))


def _split(
    name: str,
    origin: str,
    train: list[list[Message]],
    test: list[list[Message]] | None,
    num_test: int,
    max_train: int | None,
    seed: int,
) -> ChatDataset:
    """Held-out conversations are the data set's own where it has them, else drawn from train and taken out of it."""
    if test is None:
        train = random.Random(seed).sample(train, len(train))
        num_test = min(num_test, len(train) // 5)
        train, test = train[num_test:], train[:num_test]
    if not train or not test[:num_test]:
        raise DatasetError(f"{name}: {len(train)} conversations to train on and {len(test)} to test on are too few")
    return ChatDataset(name, origin, train[:max_train], test[:num_test])
