"""Chats as a model's own template writes them, and as its tokenizer reads that: the tokens of
``AutoTokenizer.apply_chat_template``, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuft.errors import InvalidInput, ModelError
from tuft.models.source import read_json
from tuft.models.tokenizer import load_tokenizer

Message = Mapping[str, str]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """That of a directory written by ``write_tokenizer_files``. Raises ModelError if it has none. A template comes with
    the model, so it runs in a sandbox."""

    def __init__(self, tokenizer_dir: Path) -> None:
        self._tokenizer = load_tokenizer(tokenizer_dir)
        config = read_json(tokenizer_dir / "tokenizer_config.json")
        text = _template_text(tokenizer_dir, config)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ModelError(f"{tokenizer_dir}: its chat template cannot be read: {error}") from error
        self._special = {name: _content(config[name]) for name in _SPECIAL if config.get(name) is not None}

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """Raises InvalidInput for messages that the template refuses."""
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special
            )
        except jinja2.TemplateError as error:
            raise InvalidInput("messages", messages, f"the model's chat template refuses them: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _template_text(directory: Path, config: Mapping[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, of which one is meant for chats
        found = next((item["template"] for item in found if item.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ModelError(f"{directory}: the model has no chat template, so chats cannot be written as it was taught")
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
