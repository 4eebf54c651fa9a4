"""Errors that name a value show its beginning, and take no longer for a large one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tuft.errors import InvalidInput


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        ("text", "'text'"),
        ([1, 2], "[1, 2]"),
        ({"a": ["b"]}, "{'a': ['b']}"),
        (None, "None"),
        (np.arange(3), "array([0, 1, 2])"),
        ("x" * 200, "'" + "x" * 116 + "..."),
        ("x" * 120, "'" + "x" * 116 + "..."),
        (10**400, "1" + "0" * 116 + "..."),
    ],
)
def test_the_value_seen_is_shown_up_to_120_characters(value: object, shown: str) -> None:
    assert str(InvalidInput("field", value, "must be right")) == f"field: got {shown}; must be right"


@pytest.mark.parametrize(
    "value", [[0] * 10**7, "x" * 10**8, [["y" * 10**6] * 1000] * 1000, {"k": list(range(10**6))}], ids=type
)
def test_a_large_value_is_not_written_out(value: object) -> None:
    started_s = time.monotonic()
    assert len(str(InvalidInput("field", value, "must be right"))) < 200
    assert time.monotonic() - started_s < 0.2
