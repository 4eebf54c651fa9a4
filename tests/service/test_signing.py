from __future__ import annotations

import time

import pytest

from tuft.service.signing import Signer

SOON = int(time.time()) + 1000


def test_a_signature_is_good_for_what_was_signed_and_as_long_as_was_said() -> None:
    signer = Signer(b"secret")
    signature = signer.sign("a", "b", expires_at_s=SOON)
    assert signer.verifies(signature, "a", "b", expires_at_s=SOON)
    assert not signer.verifies(signature, "a", "b", expires_at_s=SOON + 1)
    assert not Signer(b"other").verifies(signature, "a", "b", expires_at_s=SOON)
    past = int(time.time()) - 1
    assert not signer.verifies(signer.sign("a", expires_at_s=past), "a", expires_at_s=past)


@pytest.mark.parametrize("parts", [("ab",), ("a",), ("a", "b", ""), ("b", "a"), ('a", "b',)])
def test_parts_cannot_be_cut_in_another_way(parts: tuple[str, ...]) -> None:
    signer = Signer(b"secret")
    assert signer.sign(*parts, expires_at_s=SOON) != signer.sign("a", "b", expires_at_s=SOON)


@pytest.mark.parametrize("forged", ["", "0" * 64, "ünïcode", "\0"])
def test_anything_else_is_no_signature(forged: str) -> None:
    assert not Signer(b"secret").verifies(forged, "a", expires_at_s=SOON)
