"""Sections of the configuration about what tenants may have and what is kept: ``tuft.config`` reads them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuotasSection(Section):
    """What each tenant may have, unless ``tuft quota set`` says otherwise; without a value there is no limit. Further
    ones are ``limits.max_runs_per_tenant`` and ``limits.max_pending_per_tenant``."""

    requests_per_s: float | None = Field(
        None, gt=0, description="requests a second, but for those that only wait for results or keep a session alive"
    )
    resident_bytes: int | None = Field(None, ge=0, description="memory of the adapters and optimizers of loaded runs")
    stored_bytes: int | None = Field(None, ge=0, description="size of all checkpoints")
    tokens_per_day: int | None = Field(
        None, ge=0, description="tokens trained, prefilled and sampled in a day (UTC), those of waiting work included"
    )
    spend_per_day: float | None = Field(None, ge=0, description="cost of a day (UTC), in prices.currency")
    spend_per_month: float | None = Field(None, ge=0, description="cost of a calendar month (UTC)")
    spend_total: float | None = Field(None, ge=0, description="cost of everything")
    pause_s: float = Field(
        32 * 86_400.0,
        ge=0,
        description="how long the SDK (0.20 and newer) waits for a cap on tokens or spending to be lifted, rather than "
        "to raise BillingError",
    )


class ModelPriceSection(Section):
    """Prices of one base model, where they are not those of all."""

    train: float | None = Field(None, ge=0, le=1e6, description="the base model's own price, as prices.train")
    prefill: float | None = Field(None, ge=0, le=1e6, description="as prices.prefill")
    cached_prefill: float | None = Field(None, ge=0, le=1e6, description="as prices.cached_prefill")
    sample: float | None = Field(None, ge=0, le=1e6, description="as prices.sample")
    storage: float | None = Field(None, ge=0, le=1e6, description="as prices.storage")


class PricesSection(Section):
    """What things cost. A price of 0 costs nothing, and the API's costs are then null."""

    currency: str = Field("USD", min_length=1, max_length=8, description="of all prices and spend caps")
    train: float = Field(0.0, ge=0, le=1e6, description="a million tokens trained (forward or forward_backward)")
    prefill: float = Field(0.0, ge=0, le=1e6, description="a million tokens of prompts")
    cached_prefill: float = Field(0.0, ge=0, le=1e6, description="a million prompt tokens found in the prefix cache")
    sample: float = Field(0.0, ge=0, le=1e6, description="a million tokens sampled")
    storage: float = Field(0.0, ge=0, le=1e6, description="a gigabyte (10^9 bytes) of checkpoints for 720 hours")
    models: dict[str, ModelPriceSection] = Field({}, description="by the name of a base model")


class FairnessSection(Section):
    """Who is served next: the tenant who was served least for its weight. What a token costs is in tokens of a
    forward_backward; the defaults are times measured on a CPU."""

    weights: dict[str, float] = Field(
        {}, description="tenants by name, whose share is not 1: one of weight 3 gets three times as much as one of 1"
    )
    forward_backward: float = Field(1.0, gt=0, description="cost of a token that is trained")
    forward: float = Field(0.4, gt=0, description="cost of a token of a forward")
    prefill: float = Field(0.6, gt=0, description="cost of a token of a prompt")
    decode: float = Field(0.9, gt=0, description="cost of a token that is sampled")

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for tenant, weight in weights.items():
            if not 0.01 <= weight <= 100:
                raise ValueError(f"the weight of {tenant!r} must be 0.01 to 100")
        return weights


class JournalSection(Section):
    """What is acknowledged is on the disk; this says how much of it is in memory, too, and how soon a run is back after
    a crash."""

    snapshot_interval_s: float = Field(
        60.0,
        gt=0,
        description="a run that changes is written down again after so long; what the engine computed since is "
        "computed again after a crash, so this is about the longest that takes",
    )
    held_request_bytes: int = Field(
        2**29, ge=0, description="training data of waiting operations kept in memory; beyond that they wait on the disk"
    )
    cached_result_bytes: int = Field(2**27, ge=0, description="results kept in memory, although they are on the disk")


class StorageSection(Section):
    """How saved weights are kept."""

    min_free_bytes: int = Field(
        2**26, ge=0, description="a save that would leave less of the disk free is refused: the database needs room"
    )
    verify_interval_days: float = Field(7.0, gt=0, description="how often every checkpoint is read through")
    verify_bytes_per_s: float = Field(2**24, gt=0, description="how fast that is done at most, on average")
