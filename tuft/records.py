"""What the server remembers of its tenants' work: one frozen record a table of ``store.tables``, plus their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, Protocol

from tuft.config import USER_SCOPES, Scope
from tuft.errors import InvalidInput
from tuft.metering import Charge
from tuft.types import CheckpointKind, Float32Array, Int64Array, LoraSpec, Optimizer

RunStatus = Literal["creating", "live", "failed", "unloaded", "lost"]
"""``lost``: the engine or the server ended while the run was live; its saved checkpoints are all that is left of it."""

URN_PREFIX = "urn:tuft:tenant:"
_OPERATOR_PREFIX = "urn:tuft:operator:"

_PATH_SEGMENT: Mapping[CheckpointKind, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
_KIND: Mapping[str, CheckpointKind] = {segment: kind for kind, segment in _PATH_SEGMENT.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME_RULE = "must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or digit"


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Tenant:
    """``key_number``: that of the API key by which it calls, 0 where none does."""

    tenant_id: str
    name: str
    key_number: int = field(default=0, compare=False)

    @property
    def urn(self) -> str:
        """What the API calls a user or an owner."""
        return f"{URN_PREFIX}{self.name}"

    def owns(self, thing: Owned) -> bool:
        """Whether a thing in memory is the tenant's; of rows, the query asks that (``store.ownership``)."""
        return thing.tenant_id == self.tenant_id


class Owned(Protocol):
    @property
    def tenant_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Operator:
    """Whoever runs commands on the server's machine, by the name that the machine knows them by."""

    name: str

    @property
    def urn(self) -> str:
        return f"{_OPERATOR_PREFIX}{self.name}"


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """A tenant as the operator sees it. ``num_keys`` counts those that open the door now."""

    tenant: Tenant
    created_at: datetime
    suspended_at: datetime | None
    num_keys: int


KeyState = Literal["valid", "expired", "revoked", "suspended"]


@lru_cache(maxsize=4096)
def _key_number(key_id: str) -> int:
    """One object for all requests by that key: what is kept of each holds it."""
    return int(key_id[:12], 16)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """``key_id`` is a hash of the key, ``hint`` its last characters, ``name`` what its owner calls it, if anything;
    ``created_at`` is None for one that the configuration gives. ``suspended``: its tenant is."""

    key_id: str
    tenant: Tenant
    hint: str
    created_at: datetime | None
    name: str = ""
    scopes: tuple[Scope, ...] = USER_SCOPES
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    suspended: bool = False

    @property
    def number(self) -> int:
        """What the API calls the key: the first 48 bits of its id, which every JSON reader holds exactly."""
        return _key_number(self.key_id)

    @property
    def caller(self) -> Tenant:
        """The tenant, as one who calls by this key."""
        return replace(self.tenant, key_number=self.number)

    def state(self, moment: datetime) -> KeyState:
        """Whether it opens the door at that moment, or why not."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and moment >= self.expires_at:
            return "expired"
        return "suspended" if self.suspended else "valid"


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
    project_id: str | None = None
    finish_reason: str | None = None
    finish_detail: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


SessionStatus = Literal["active", "failed", "client_finished"]
"""``failed``: one of its runs never began, or was lost. Beside these a session may have fallen silent."""


@dataclass(frozen=True, slots=True)
class StatusFilter:
    """Sessions of this status, which may be one that none ever has. ``reasons``: those that the client gave."""

    status: str
    reasons: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class SessionSearch:
    """What the sessions to find have in common; None or empty is any. ``session_id`` and ``name_words`` together mean
    either. ``owners`` are names of tenants; ``after`` is the last session of the page before."""

    session_id: str | None = None
    name_words: tuple[str, ...] = ()
    project_ids: tuple[str, ...] | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    owners: tuple[str, ...] | None = None
    statuses: tuple[StatusFilter, ...] | None = None
    limit: int = 50
    after: tuple[datetime, str] | None = None


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session that was found. ``failed_run`` is the run that gave the status, if one did."""

    session: Session
    owner: Tenant
    status: SessionStatus | None
    failed_run: tuple[str, RunStatus] | None
    num_checkpoints: int
    checkpoint_bytes: int


Shared = Mapping[str, frozenset[str]]
"""Projects of several tenants: project id to the names of its members."""


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
    optimizer: Optimizer = "adamw"
    key_number: int = 0

    @property
    def corrupted(self) -> bool:
        return self.status in ("failed", "lost")


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """``tinker://<run_id>/<weights|sampler_weights|external_weights>/<name>``."""

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
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in _KIND or not (parts[0] and parts[0].isprintable()):
            allowed = f"must read tinker://<run id>/<{'|'.join(_KIND)}>/<name>"
            raise InvalidInput(field, path, allowed)
        return cls(parts[0], _KIND[parts[1]], valid_name(parts[2], field))


def valid_name(name: str, field: str) -> str:
    """``name`` if it can name a tenant, a key, a checkpoint or a directory; else InvalidInput naming ``field``."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(field, name, _NAME_RULE)
    return name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved adapter. ``directory`` is relative to the home's ``checkpoints``; a new save never reuses one, so that
    the row's commit is the moment at which a name changes its meaning; a copy shares its source's. ``public``: every
    tenant may read it. ``digest``: that of the manifest of its files, which older servers did not keep; ``damage``:
    what was wrong with them when they were last looked at, None if nothing was; ``saved_seq``: the operation of the run
    that saved it."""

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
    optimizer: Optimizer = "adamw"
    public: bool = False
    digest: str | None = None
    damage: str | None = None
    saved_seq: int | None = None


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """A sampling session: the base model itself (``model_path`` and ``directory`` None), a saved checkpoint, or the
    ephemeral weights in ``directory`` (``model_path`` None), which operation ``saved_seq`` of a run saved. Those with
    ``inflight_run_id`` share the weights that this run published last."""

    sampler_id: str
    tenant_id: str
    session_id: str
    sampling_session_seq_id: int
    base_model: str
    model_path: str | None
    directory: str | None
    created_at: datetime
    inflight_run_id: str | None = None
    saved_seq: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingClient:
    """One of the clients of a sampling session: the first, whose ``clone_id`` is 0, or a copy in another process. Each
    counts its samples from ``clone_id * SEQS_PER_CLIENT`` on."""

    sampler_id: str
    clone_id: int = 0

    @classmethod
    def of_seq(cls, sampler_id: str, seq_id: int) -> SamplingClient:
        return cls(sampler_id, seq_id // SEQS_PER_CLIENT)


SEQS_PER_CLIENT = 1_000_000_000


@dataclass(frozen=True, slots=True)
class RecordedSequence:
    """A sampled sequence as it was when it was sampled; ``logprobs_N`` float32, of the temperature-scaled
    distribution."""

    sequence_id: str
    prompt_tokens_P: Int64Array
    tokens_N: Int64Array
    logprobs_N: Float32Array


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """``event`` reads ``<resource>_<action>``; ``details`` say who did it (``actor``) and what it was about; ``tenant``
    is the name of whom it concerns."""

    at: datetime
    event: str
    details: Mapping[str, str | int | None]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointStorage:
    """What the checkpoints of one owner in one project hold now."""

    project_id: str
    owner: Tenant
    num_checkpoints: int
    num_bytes: int


FutureKind = Literal["operation", "sample", "custom_loss", "unload"]
Outcome = Literal["ok", "failed", "spent"]
"""``spent``: failed in the engine, which had taken the run's gradients already: a step whose norm was not finite."""


@dataclass(frozen=True, slots=True)
class FutureKey:
    """What a client counts a request by: (run, seq), (sampling session, seq), (loss, its seq). A retry has the same."""

    kind: FutureKind
    subject_id: str
    seq: int


@dataclass(frozen=True, slots=True)
class JournaledFuture:
    """An acknowledged request. ``digest`` is that of what its client sent; ``num_rows`` what a loss needs of a pass.
    ``outcome`` is None while it is pending, ``result_bytes`` also once its result is no longer kept."""

    future_id: str
    tenant_id: str
    key_number: int
    key: FutureKey
    name: str
    digest: str
    num_rows: int
    request_bytes: int
    accepted_at: datetime
    charge: Charge = field(default_factory=Charge)
    outcome: Outcome | None = None
    result_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state after all operations up to ``seq``, in ``directory`` of the home's ``snapshots``, with the digest
    of its manifest."""

    run_id: str
    seq: int
    directory: str
    size_bytes: int
    digest: str
