"""What is taken out of texts before others read them: keys, paths of the server's machine, values that clients sent.

Errors are told to their callers without keys and paths (``TuftError.told``); what is logged is also without the values
that errors quote, since those are pieces of prompts and data.
"""

from __future__ import annotations

import re

_KEYS = (
    (re.compile(r"tml-[A-Za-z0-9_-]{3,}"), "tml-…"),
    (re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+"), "eyJ…"),
    (re.compile(r"(?i)(AGE-SECRET-KEY-)[A-Z0-9]+"), r"\1…"),
    (re.compile(r"(signature|token|password)=[^&\s'\"]+"), r"\1=…"),
    (re.compile(r"(://[^\s:/@]+):[^\s:/@]+@"), r"\1:…@"),
)
_PATH = re.compile(r"(?<![\w/.~-])(?<!:/)(?:/[^\s/:;,'\"()<>]+){2,}")
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)[^\s'\"()]+")
_ROUTES = ("/api/", "/docs", "/openapi")
_VALUE = re.compile(r"(: got ).*(; )", re.DOTALL)
MAX_CHARS = 2000


def without_keys(text: str) -> str:
    for pattern, instead in _KEYS:
        text = pattern.sub(instead, text)
    return text


def without_paths(text: str) -> str:
    """Of an absolute path, its last name stays."""
    text = _SQLITE.sub(r"\1…", text)
    return _PATH.sub(_last_name, text)


def without_values(text: str) -> str:
    """Of ``<field>: got <value>; <allowed>``, the value goes."""
    return _VALUE.sub(r"\1…\2", text)


def short(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def for_logs(text: str) -> str:
    return short(without_values(without_paths(without_keys(text))))


def _last_name(found: re.Match[str]) -> str:
    path = found[0]
    return path if path.startswith(_ROUTES) else f"…/{path.rpartition('/')[2]}"
