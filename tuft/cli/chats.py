"""Chats of a file as the tokens that a fine-tuning run will train on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuft.errors import InvalidInput
from tuft.models.chat_template import ChatTemplate, Message

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Chats:
    """``inputs``: of each conversation that has something to learn, the tokens that a datum made of it holds: all but
    its last, at most ``max_tokens``. ``num_dropped``: of those whose first answer comes later than that."""

    inputs: tuple[tuple[int, ...], ...]
    num_cut: int
    num_dropped: int

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.inputs)


def render(conversations: Sequence[Sequence[Message]], template: ChatTemplate, max_tokens: int) -> Chats:
    """The conversations as ``docs/guides/chat-sft.md`` trains them. Raises InvalidInput."""
    inputs, num_cut = [], 0
    for messages in conversations:
        tokens = template.tokens(messages)
        turn = next(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        start = len(template.tokens(messages[:turn], add_generation_prompt=True))
        kept = tokens[: max_tokens + 1]
        if start < len(kept):
            inputs.append(tuple(kept[:-1]))
            num_cut += len(kept) < len(tokens)
    return Chats(tuple(inputs), num_cut, len(conversations) - len(inputs))


def read_chats(file: Path) -> list[list[Message]]:
    """One ``{"messages": [...]}`` a line. Raises InvalidInput naming file, line and field."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("dataset", str(file), f"cannot be read: {error}") from error
    found = [_messages(line, f"dataset: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidInput("dataset", str(file), "holds no conversation")
    return found


def num_steps(num_data: int, epochs: float, batch_size: int) -> int:
    return max(1, math.ceil(epochs * num_data / batch_size))


def _messages(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidInput(where, line, f"is not JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InvalidInput(f"{where}: messages", messages, "must be a list with at least one message")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES:
            raise InvalidInput(f"{where}: messages[{index}].role", role, f"must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise InvalidInput(f"{where}: messages[{index}].content", content, "must be text that is not empty")
        checked.append({"role": role, "content": content.strip()})
    if not any(message["role"] == "assistant" for message in checked):
        raise InvalidInput(f"{where}: messages", "no assistant", "must hold an answer to learn from")
    return checked
