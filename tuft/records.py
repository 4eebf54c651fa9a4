"""What the server remembers of its tenants' work: one frozen record a table of ``store.tables``, plus their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from tuft.errors import InvalidInput
from tuft.types import CheckpointKind, LoraSpec

RunStatus = Literal["creating", "live", "failed", "unloaded", "lost"]
"""``lost``: the engine or the server ended while the run was live; its saved checkpoints are all that is left of it."""

_PATH_SEGMENT: Mapping[CheckpointKind, str] = {"training": "weights", "sampler": "sampler_weights"}
_KIND: Mapping[str, CheckpointKind] = {segment: kind for kind, segment in _PATH_SEGMENT.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_RULE = "must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or digit"


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Tenant:
    tenant_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Session:
    """One SDK client's connection."""

    session_id: str
    tenant_id: str
    created_at: datetime
    tags: tuple[str, ...]
    user_metadata: Mapping[str, str]
    sdk_version: str
    display_name: str | None
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: base model + adapter + optimizer + sequence counter. ``run_id`` is
    ``<session_id>:train:<model_seq_id>``; the SDK composes it the same way."""

    run_id: str
    tenant_id: str
    session_id: str
    model_seq_id: int
    base_model: str
    spec: LoraSpec
    status: RunStatus
    created_at: datetime
    last_request_at: datetime
    user_metadata: Mapping[str, str]

    @property
    def corrupted(self) -> bool:
        return self.status in ("failed", "lost")


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """``tinker://<run_id>/<weights|sampler_weights>/<name>``."""

    run_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        return f"{_PATH_SEGMENT[self.kind]}/{self.name}"

    @classmethod
    def parse(cls, path: str, field: str = "path") -> CheckpointPath:
        """Raises InvalidInput naming ``field`` if ``path`` has another shape."""
        scheme, _, rest = path.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in _KIND or not parts[0]:
            raise InvalidInput(field, path, "must read tinker://<run id>/<weights|sampler_weights>/<name>")
        return cls(parts[0], _KIND[parts[1]], valid_name(parts[2], field))


def valid_name(name: str, field: str) -> str:
    """``name`` if it can name a tenant, a checkpoint or a directory; else InvalidInput naming ``field``."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(field, name, _NAME_RULE)
    return name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved adapter. ``directory`` is relative to the home's ``checkpoints``; a new save never reuses one, so that
    the row's commit is the moment at which a name changes its meaning."""

    path: CheckpointPath
    tenant_id: str
    base_model: str
    spec: LoraSpec
    directory: str
    size_bytes: int
    has_optimizer: bool
    created_at: datetime
    expires_at: datetime | None
    user_metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """A sampling session: the base model itself (``model_path`` and ``directory`` None), a saved checkpoint, or the
    ephemeral weights in ``directory`` (``model_path`` None)."""

    sampler_id: str
    tenant_id: str
    session_id: str
    sampling_session_seq_id: int
    base_model: str
    model_path: str | None
    directory: str | None
    created_at: datetime
