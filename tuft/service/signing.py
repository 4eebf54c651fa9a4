"""Proof that the server itself gave something out: a keyed hash over what it is and until when it is good."""

from __future__ import annotations

import hashlib
import hmac
import json
import time


class Signer:
    """Links to what is fetched without a key. Whoever has the signature has the right."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, *parts: str, expires_at_s: int) -> str:
        """The signature of ``parts``, good until that moment (Unix time)."""
        signed = json.dumps([*parts, expires_at_s]).encode()
        return hmac.digest(self._secret, signed, hashlib.sha256).hex()

    def verifies(self, signature: str, *parts: str, expires_at_s: int) -> bool:
        """Whether ``sign`` made that signature, and it is still good."""
        expected = self.sign(*parts, expires_at_s=expires_at_s)
        return hmac.compare_digest(signature.encode(), expected.encode()) and time.time() <= expires_at_s
