from __future__ import annotations

import base64
import json
import time

import pytest

from tuft.errors import InvalidToken
from tuft.service.jwt import PREFIX, decode, encode

SECRET = b"s" * 32


def test_what_was_signed_is_read_back() -> None:
    claims = {"sub": "ü", "exp": time.time() + 60}
    token = encode(claims, SECRET)
    assert token.startswith(PREFIX)
    assert decode(token, SECRET) == claims


def test_the_example_of_rfc_7515_has_our_signature_and_has_expired() -> None:
    key = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow=="
    token = (
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9"
        ".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
        ".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    )
    with pytest.raises(InvalidToken, match="expired"):
        decode(token, base64.urlsafe_b64decode(key))


def test_a_token_that_was_touched_is_refused() -> None:
    header, claims, signature = encode({"sub": "alice", "exp": time.time() + 60}, SECRET).split(".")
    other = base64.urlsafe_b64encode(json.dumps({"sub": "bob", "exp": time.time() + 60}).encode()).decode().rstrip("=")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    forged = (f"{header}.{other}.{signature}", f"{unsigned}.{claims}.", f"{header}.{claims}", f"{PREFIX}é", PREFIX)
    for token in forged:
        with pytest.raises(InvalidToken, match="not made by this server"):
            decode(token, SECRET)
    with pytest.raises(InvalidToken):
        decode(f"{header}.{claims}.{signature}", b"another")
