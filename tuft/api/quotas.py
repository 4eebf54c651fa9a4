"""How a quota is refused, so that the SDK says why and its loop goes on.

429 with ``Retry-After`` is the answer to everyone. The SDK tries again: by itself up to ten times and silently, which
is right for a moment; ``x-should-retry: false`` leaves that to its loop of about five minutes, which logs
``x-deprecation-note`` each time (0.34 and newer). A cap that only time or an operator lifts outlasts both: SDKs since
0.20 get 402 for it, on which they log the text as a warning, wait, and ask again every five seconds for as long as
``client/config`` says (``quotas.pause_s``).
"""

from __future__ import annotations

import math
import re

from tuft.errors import CapReached, QuotaExceeded

_PAUSES_SINCE = (0, 20)
_SDK = re.compile(r"AsyncTinker/Python (\d+)\.(\d+)")
_DEFAULT_RETRY_AFTER_S = 5.0
_SILENT_S = 2.0
"""What the SDK may wait for without a word."""


def quota_answer(error: QuotaExceeded, user_agent: str) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    retry_after_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    headers = {"Retry-After": str(max(math.ceil(retry_after_s), 1))}
    if isinstance(error, CapReached) and _pauses(user_agent):
        return 402, headers
    headers["x-deprecation-note"] = _one_line(f"no deprecation, but a quota: {error}")
    if retry_after_s > _SILENT_S:
        headers["x-should-retry"] = "false"
    return 429, headers


def _pauses(user_agent: str) -> bool:
    found = _SDK.match(user_agent)
    return found is not None and (int(found[1]), int(found[2])) >= _PAUSES_SINCE


def _one_line(text: str) -> str:
    """As a header can carry it."""
    return " ".join(text.encode("ascii", "replace").decode().split())
