"""Configuration: one TOML file, overridden by ``TUFT_*`` environment variables, overridden by CLI options.

Every option has a default; an unknown key is an error; nothing heavy is imported here. The environment names nest with
two underscores: ``TUFT_SERVER__PORT=8000``, ``TUFT_LIMITS__MAX_RANK=64``; ``TUFT_HOME`` moves the state.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tuft.errors import ConfigError
from tuft.sections import FairnessSection, JournalSection, PricesSection, QuotasSection, Section, StorageSection

API_KEY_PREFIX = "tml-"
"""The SDK refuses keys without it (since 0.8.1), so no other key is ever minted or accepted."""


Scope = Literal["train", "sample", "read", "admin"]
"""What an API key may be used for: runs and checkpoints; samples; looking and downloading; other tenants' keys."""
ALL_SCOPES: tuple[Scope, ...] = ("train", "sample", "read", "admin")
USER_SCOPES: tuple[Scope, ...] = ("train", "sample", "read")

DEFAULT_PROJECT = "default"
"""Every tenant's own project: that of sessions which name none."""


class ServerSection(Section):
    """Where the server listens, and how long it waits."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(10610, ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    drain_timeout_s: float = Field(30.0, ge=0, description="how long SIGTERM waits for queued work to end")
    jwt_auth: bool = Field(
        True,
        description="the SDK exchanges its API key for a JWT, in which whoami reads; false: it sends the key itself",
    )
    long_poll_s: float = Field(30.0, gt=0, le=40, description="how long retrieve_future holds before it answers 408")
    header_timeout_s: float = Field(
        20.0, gt=0, description="how long a connection may take to send a request's head; then it is closed"
    )
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        description="in each such time, a sender must bring min_bytes_per_s of its body and a reader take as much of "
        "its answer; else the connection is closed",
    )
    min_bytes_per_s: float = Field(16_384.0, gt=0, description="slowest sender or reader, see body_timeout_s")
    keep_alive_s: float = Field(75.0, gt=0, description="how long a connection may stay open between requests")


class BaseModelSection(Section):
    """A base model that tenants may train on and sample from."""

    name: str = Field(min_length=1, description="the name that clients use, e.g. Qwen/Qwen3-4B-Instruct-2507")
    path: str | None = Field(
        None,
        description="local directory (config.json + safetensors), GGUF file or hub id; default: the name as a hub id",
    )
    aliases: tuple[str, ...] = Field((), description="further names for the same model")
    max_context_tokens: int | None = Field(None, ge=8, description="longest sequence; default: the model's own limit")
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="auto: bf16 base products where the hardware has bf16, else float32"
    )


class EngineSection(Section):
    """How the engine computes."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    micro_batch_tokens: int | None = Field(
        None, ge=64, description="most tokens of one forward and backward pass; default: 1024 on a CPU, 8192 on a GPU"
    )
    kv_cache_tokens: int = Field(
        65_536, ge=256, description="tokens that all sequences being sampled may hold together"
    )
    max_decode_rows: int = Field(32, ge=1, le=4096, description="most sequences decoded together")
    packed_decode: bool = Field(
        True, description="keep base weights a second time, from the first sample on: CPU decoding in bf16 takes half"
    )
    compiled_kernels: bool = Field(
        True,
        description="CPU kernels compiled by numba at first start, about a minute, and kept in the home; false: "
        "torch's operators only",
    )
    adapter_memory_gib: float | None = Field(
        None,
        gt=0,
        description="GPU memory for adapters and their optimizer state; those used longest ago wait in the host's "
        "memory; default: what the memory plan leaves free",
    )
    run_memory_gib: float | None = Field(
        None,
        gt=0,
        description="memory of the host for adapters and optimizers of training runs; those used longest ago leave for "
        "the disk, and come back when they are used; default: 40 % of the machine's",
    )
    memory_limit_gib: float | None = Field(
        None,
        gt=0,
        description="memory of the host that the engine may take in all; passes and samples are cut to fit, and what "
        "cannot fit is refused; default: what the machine or its container has",
    )
    num_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: torch's own choice")
    deterministic: bool | None = Field(
        None,
        description="the same operations give the same bits whoever else is here, and in every life of the engine; the "
        "very first start then waits for CPU kernels to be compiled; default: true on a CPU; a GPU cannot",
    )


class LimitsSection(Section):
    """What one request may ask for."""

    max_rank: int = Field(256, ge=1, description="largest LoRA rank")
    max_request_bytes: int = Field(128 * 2**20, ge=2**20, description="largest request body, before and after zstd")
    max_control_bytes: int = Field(
        2**20, ge=2**12, description="largest body of a request that carries neither training data nor a prompt"
    )
    max_inflight_bytes: int = Field(
        2**30,
        ge=2**22,
        description="bodies that are being received or decoded, and large answers that are being sent, together; "
        "requests beyond wait, then get 503",
    )
    max_header_bytes: int = Field(2**15, ge=2**10, description="largest head of a request: its line and headers")
    max_connections: int = Field(
        20_000,
        ge=8,
        description="open connections; beyond them the one that has been idle longest is closed for a new one, and "
        "where none is idle the new one gets 503",
    )
    max_data: int = Field(4096, ge=1, description="data of one forward_backward; the SDK sends up to 1024")
    max_tokens: int = Field(2**22, ge=1, description="tokens of all data of one forward_backward")
    max_prompt_tokens: int = Field(
        2**20, ge=1, description="tokens of one prompt, whatever the base model; its context is the other limit"
    )
    max_chunks: int = Field(2**14, ge=1, description="chunks of one datum or prompt")
    max_names: int = Field(64, ge=1, description="inputs of one datum; options of one loss")
    max_num_samples: int = Field(128, ge=1, description="largest num_samples of one sample request")
    max_stops: int = Field(64, ge=0, description="stop strings or stop tokens of one sample request")
    max_stop_bytes: int = Field(1024, ge=1, description="longest stop string in UTF-8")
    max_topk: int = Field(1024, ge=0, description="most tokens with logprobs at one place of a prompt or sample")
    max_logprobs: int = Field(
        2**22, ge=1, description="most logprobs that one option of a sample request may ask for; each is 8 bytes"
    )
    max_name_chars: int = Field(128, ge=1, le=128, description="longest name of a checkpoint, project or custom loss")
    max_text_chars: int = Field(1000, ge=128, description="any other text in a request: ids, paths, tags, labels")
    max_tags: int = Field(64, ge=0, description="tags of one session")
    max_metadata_bytes: int = Field(2**14, ge=0, description="user_metadata of one object")
    max_listed_ids: int = Field(100_000, ge=1, description="futures that one retrieve_futures may name as read")
    max_recipients: int = Field(10, ge=1, description="age recipients of one save_weights_external")
    max_custom_losses: int = Field(128, ge=1, description="custom losses of one session")
    max_loss_nodes: int = Field(2000, ge=1, le=2000, description="nodes of the graph of one custom loss")
    max_runs_per_tenant: int = Field(64, ge=1, description="training runs of one tenant that may be loaded at once")
    max_sessions_per_tenant: int = Field(1000, ge=1, description="sessions of one tenant that may live at once")
    max_pending_per_tenant: int = Field(20_000, ge=1, description="operations and samples of one tenant that may wait")
    result_retention_s: float = Field(600.0, ge=1, description="how long a result is kept after it was delivered")
    unread_retention_s: float = Field(21_600.0, ge=1, description="how long a result that nobody reads is kept")
    session_timeout_s: float = Field(
        3600.0, ge=60, description="a session that is silent for so long is over, and its runs are unloaded"
    )
    max_resident_samplers: int = Field(64, ge=1, description="sampler adapters kept loaded; the least used leave first")
    audit_retention_days: float = Field(90.0, gt=0, description="how long entries of the audit log are kept")
    usage_retention_days: float = Field(400.0, ge=14, description="how long hourly usage is kept")
    seq_gap_timeout_s: float = Field(330.0, ge=1, description="how long an operation waits for a missing earlier seq")


class KeySection(Section):
    """An API key given by the configuration. ``tuft key create`` makes better ones: they are stored hashed."""

    tenant: str = Field(min_length=1, max_length=64, description="whose key it is")
    key: SecretStr = Field(description="the key itself; begins with tml-")
    scopes: tuple[Scope, ...] = Field(
        USER_SCOPES, min_length=1, description="what it may be used for: any of train, sample, read, admin"
    )

    @field_validator("key")
    @classmethod
    def _prefixed(cls, key: SecretStr) -> SecretStr:
        if not key.get_secret_value().startswith(API_KEY_PREFIX):
            raise ValueError(f"must start with {API_KEY_PREFIX!r}: the SDK refuses other keys")
        return key


class ProjectSection(Section):
    """A project that several tenants share. An id that no section lists is the private label of whoever uses it."""

    project_id: str = Field(min_length=1, max_length=128, description="the id that clients give as project_id")
    tenants: tuple[str, ...] = Field(
        (), description="names of its members, who see and load each other's sessions, runs and checkpoints in it"
    )

    @field_validator("project_id")
    @classmethod
    def _shareable(cls, project_id: str) -> str:
        if project_id == DEFAULT_PROJECT:
            raise ValueError(f"{DEFAULT_PROJECT!r} is every tenant's own project; share another")
        return project_id


class Config(BaseSettings):
    """The whole configuration. ``base_models`` empty means the embedded SmolLM2-135M-Instruct."""

    model_config = SettingsConfigDict(env_prefix="TUFT_", env_nested_delimiter="__", extra="forbid", frozen=True)

    home: Path = Field(
        Path("~/.tuft"), validate_default=True, description="directory of the database, keys and checkpoints"
    )
    database_url: SecretStr | None = Field(
        None, description="postgresql://USER:PASSWORD@HOST:PORT/NAME, or sqlite:////PATH; default: SQLite in the home"
    )
    api_key: SecretStr | None = Field(
        None, description="TUFT_API_KEY: a further key for the tenant 'default', of every scope"
    )
    server: ServerSection = ServerSection()
    engine: EngineSection = EngineSection()
    limits: LimitsSection = LimitsSection()
    fairness: FairnessSection = FairnessSection()
    journal: JournalSection = JournalSection()
    storage: StorageSection = StorageSection()
    quotas: QuotasSection = QuotasSection()
    prices: PricesSection = PricesSection()
    base_models: tuple[BaseModelSection, ...] = ()
    keys: tuple[KeySection, ...] = ()
    projects: tuple[ProjectSection, ...] = ()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("api_key")
    @classmethod
    def _api_key_prefixed(cls, key: SecretStr | None) -> SecretStr | None:
        return None if key is None else KeySection._prefixed(key)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        seen: set[str] = set()
        for model in self.base_models:
            for name in (model.name, *model.aliases):
                if name in seen:
                    raise ValueError(f"base_models: the name {name!r} is used twice")
                seen.add(name)
        return self

    @model_validator(mode="after")
    def _priced_models_are_served(self) -> Config:
        served = [model.name for model in self.base_models]
        for name in self.prices.models if served else ():
            if name not in served:
                raise ValueError(f"prices.models: {name!r} is not among base_models: {', '.join(served)}")
        return self

    @model_validator(mode="after")
    def _projects_are_unique(self) -> Config:
        ids = [project.project_id for project in self.projects]
        for project_id in ids:
            if ids.count(project_id) > 1:
                raise ValueError(f"projects: {project_id!r} is listed twice")
        return self


def load_config(path: Path | None = None, **overrides: Any) -> Config:
    """Read ``path`` (TOML), then the environment, then ``overrides`` (dotted option to value; None is ignored).

    Raises ConfigError that lists every problem: option, value seen, what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return _layered(overrides)(**values)
    except ValidationError as error:
        where = str(path) if path is not None else "configuration"
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in _problems(error))) from error


def _layered(overrides: Mapping[str, Any]) -> type[Config]:
    """Config with the order of its sources: ``overrides``, the environment, then what it is called with."""
    tree: dict[str, Any] = {}
    for dotted, value in overrides.items():
        *sections, option = dotted.split(".")
        leaf = tree
        for section in sections:
            leaf = leaf.setdefault(section, {})
        if value is not None:
            leaf[option] = value

    class Layered(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return InitSettingsSource(settings_cls, init_kwargs=tree), env_settings, init_settings

    return Layered


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        option = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{option}: unknown option; `tuft config --show` lists all")
        elif "key" in option or option == "database_url":
            lines.append(f"{option}: {item['msg']}")
        else:
            lines.append(f"{option}: got {item['input']!r}; {item['msg']}")
    return lines
