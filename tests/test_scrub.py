from __future__ import annotations

import pickle

import pytest

from tests.api.test_http import subclasses
from tuft import errors, scrub

KEY = "tml-AbCdEf0123456789_-xyz"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        (f"unknown key {KEY}!", "unknown key tml-…!"),
        (f"token {JWT} has expired", "token eyJ… has expired"),
        ("GET /download/x?expires=3&signature=abc-_9&a=b", "GET /download/x?expires=3&signature=…&a=b"),
        ("postgresql://tuft:secret@host/db refused", "postgresql://tuft:…@host/db refused"),
        ("AGE-SECRET-KEY-1QQPZ", "AGE-SECRET-KEY-…"),
        ("a key must start with 'tml-'", "a key must start with 'tml-'"),
    ],
)
def test_keys_are_taken_out(text: str, without: str) -> None:
    assert scrub.without_keys(text) == without


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("/home/me/.tuft/checkpoints/a/b.safetensors is damaged", "…/b.safetensors is damaged"),
        ("cannot open '/var/lib/tuft/secret': denied", "cannot open '…/secret': denied"),
        ("[Errno 28] No space left on device: '/mnt/x/y'", "[Errno 28] No space left on device: '…/y'"),
        ("database sqlite:////home/me/.tuft/tuft.sqlite3 cannot", "database sqlite:///… cannot"),
        ("tinker://s:train:0/weights/name is taken", "tinker://s:train:0/weights/name is taken"),
        ("this server does not know POST /api/v1/nothing", "this server does not know POST /api/v1/nothing"),
        ("Qwen/Qwen3-4B and/or http://localhost:10610/api", "Qwen/Qwen3-4B and/or http://localhost:10610/api"),
    ],
)
def test_of_a_path_the_last_name_stays(text: str, without: str) -> None:
    assert scrub.without_paths(text) == without


def test_of_what_a_client_sent_logs_keep_nothing() -> None:
    error = errors.InvalidInput("prompt", "my; secret: got text", "must be shorter; or none")
    assert scrub.for_logs(str(error)) == "prompt: got …; or none"


def test_no_text_is_without_end() -> None:
    assert len(scrub.short("x" * 10**6)) == scrub.MAX_CHARS


@pytest.mark.parametrize("kind", subclasses(errors.TuftError), ids=lambda kind: str(kind.__name__))
def test_no_error_tells_its_caller_a_key_or_a_path_of_the_server(kind: type[errors.TuftError]) -> None:
    text = f"/home/me/.tuft/checkpoints/x: {KEY} {JWT} " + "x" * 10_000
    error = kind("key", text, "must be ours") if kind is errors.InvalidInput else kind(text)
    for told in (error.told, pickle.loads(pickle.dumps(error)).told):
        assert KEY not in told
        assert JWT not in told
        assert len(told) <= scrub.MAX_CHARS
        assert issubclass(kind, errors.UserError) or "/home" not in told  # what users sent themselves, they may see
