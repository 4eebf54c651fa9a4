"""What a request may ask, checked before anything is queued or allocated. Each function raises InvalidInput."""

from __future__ import annotations

from collections.abc import Sequence

from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.store.age import parse_recipient
from tuft.types import LoraSpec

MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 24 * 3600


def check_seq(seq_id: int, field: str) -> None:
    """A client's own counter, kept as a 64-bit integer."""
    if not 0 <= seq_id < 2**63:
        raise InvalidInput(field, seq_id, "must be 0 to 2**63 - 1")


def check_lora(spec: LoraSpec, limits: LimitsSection) -> None:
    if not 1 <= spec.rank <= limits.max_rank:
        raise InvalidInput("lora_config.rank", spec.rank, f"must be 1 to {limits.max_rank} (limits.max_rank)")
    if not (spec.train_attn or spec.train_mlp or spec.train_unembed):
        raise InvalidInput("lora_config", "no layers", "one of train_attn, train_mlp, train_unembed must be true")
    if spec.seed is not None and not 0 <= spec.seed < 2**63:
        raise InvalidInput("lora_config.seed", spec.seed, "must be 0 to 2**63 - 1")


def check_recipients(recipients: Sequence[str] | None) -> None:
    """Whom age encrypts to. What was meant as a key is not shown: it may be the secret one."""
    field = "age_encryption_recipients"
    if recipients is not None and not recipients:
        raise InvalidInput(field, "0 recipients", "must be at least 1, or absent")
    for index, recipient in enumerate(recipients or ()):
        try:
            parse_recipient(recipient)
        except ValueError as error:
            allowed = f"must be an age1... key or an SSH public key: {error}"
            raise InvalidInput(f"{field}[{index}]", f"{recipient[:8]}…", allowed) from error


def check_sampler_kind(kind: str, name: str | None, ttl_seconds: int | None) -> None:
    if kind not in ("snapshot", "inflight"):
        raise InvalidInput("kind", kind, "must be 'snapshot' or 'inflight'")
    for field, value in (("path", name), ("ttl_seconds", ttl_seconds)):
        if kind == "inflight" and value is not None:
            raise InvalidInput(field, value, "inflight weights have neither name nor ttl: they last as their session")


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None and not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S:
        raise InvalidInput("ttl_seconds", ttl_seconds, f"must be {MIN_TTL_S} to {MAX_TTL_S}, or absent for no expiry")
