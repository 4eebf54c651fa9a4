"""JSON Web Tokens as RFC 7519 and RFC 7515 have them, signed with HMAC-SHA256: the one kind that this server makes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from tuft.errors import InvalidToken

PREFIX = "eyJ"
"""Every token begins with it: the base64 of ``{"``."""


def encode(claims: Mapping[str, Any], secret: bytes) -> str:
    signed = f"{_base64(json.dumps({'alg': 'HS256', 'typ': 'JWT'}))}.{_base64(json.dumps(claims))}"
    return f"{signed}.{_signature(signed, secret)}"


def decode(token: str, secret: bytes) -> Mapping[str, Any]:
    """The claims. Raises InvalidToken unless the signature is ours and ``exp`` lies ahead; what a header says is not
    asked: nothing else was ever signed with the secret."""
    signed, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(signed, secret).encode()):
        raise InvalidToken("this JWT was not made by this server")
    encoded = signed.partition(".")[2]
    claims: Mapping[str, Any] = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    if time.time() >= claims["exp"]:
        raise InvalidToken("this JWT has expired; POST /api/v1/auth/token makes another")
    return claims


def _signature(signed: str, secret: bytes) -> str:
    return _base64(hmac.digest(secret, signed.encode("utf-8", "surrogateescape"), hashlib.sha256))


def _base64(content: str | bytes) -> str:
    encoded = base64.urlsafe_b64encode(content.encode() if isinstance(content, str) else content)
    return encoded.decode().rstrip("=")
