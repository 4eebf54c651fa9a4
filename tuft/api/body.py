"""Request bodies: read within a limit, decompressed within the same limit, parsed into models that forgive unknown
fields and name what is wrong with known ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sized
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, ParamSpec, TypeVar

import zstandard
from fastapi import Depends, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from tuft.api.auth import Caller, Served
from tuft.api.inflight import Bounded, Hold, InFlight
from tuft.config import LimitsSection
from tuft.errors import InvalidInput, TooLarge
from tuft.records import Tenant

ClientSeq = Annotated[int, Field(ge=0, lt=2**63)]
"""What clients count their runs, samplers and samples with."""
_NUL = b"\\u0000"
_OFF_LOOP_BYTES = 2**20
_PREFIX_BYTES = 2**16
_PARSED_BYTES_OF_JSON = 8
"""What a byte of JSON may become: a number of four digits and its comma are an object of 28 bytes and a pointer."""
_PARSED_BYTES_OF_PROTOBUF = 2

_DEFAULT_LIMITS = LimitsSection()

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="Fields")
N = TypeVar("N", bound="Fields")


class Fields(BaseModel):
    """Base of the JSON bodies. Unknown fields are ignored, so that a newer SDK does not break us; a field that is left
    out has the SDK's own default, since old SDKs leave defaults out."""

    # ids come once: pydantic would keep 16,384 of them
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), cache_strings="keys")

    holds_data: ClassVar[bool] = False
    """Training data or a prompt: as large as ``limits.max_request_bytes``."""
    long_texts: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be longer than ``limits.max_text_chars``."""
    is_protobuf_too: ClassVar[bool] = False
    one_of: ClassVar[tuple[type[Fields], ...]] = ()
    """The whole bodies, where this model only tells them apart."""

    @classmethod
    def limit_bytes(cls, limits: LimitsSection) -> tuple[int, str]:
        """Of the body, and the option that says so."""
        name = "max_request_bytes" if cls.holds_data else "max_control_bytes"
        return getattr(limits, name), f"limits.{name}"

    @field_validator("*")
    @classmethod
    def _texts_are_short(cls, value: Any, info: ValidationInfo) -> Any:
        most = limits_of(info).max_text_chars
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and len(text) > most and info.field_name not in cls.long_texts:
                raise PydanticCustomError("too_long", f"must have at most {most} characters (limits.max_text_chars)")
        return value


@dataclass(frozen=True, slots=True)
class Sent(Generic[M]):
    """A body as it came, decompressed. With ``oversize``, ``content`` is but its beginning."""

    model: type[M]
    content: bytes
    oversize: TooLarge | None
    limits: LimitsSection

    def parse(self) -> M:
        """Raises InvalidInput or TooLarge."""
        return self.parse_as(self.model)

    def parse_as(self, part: type[N]) -> N:
        """The fields of a smaller model, whatever the others are."""
        if self.oversize is not None:
            raise self.oversize
        return parse(part, self.content, self.limits)


class Reader(Generic[M]):
    """What a route depends on for its body, once it is known who calls; ``api.document`` shows ``model``."""

    def __init__(self, model: type[M]) -> None:
        self.model = model

    async def receive(
        self, request: Request, services: Served, caller: Caller, inflight: Bounded
    ) -> AsyncIterator[Sent[M]]:
        async with self._received(request, services.config.limits, caller, inflight) as sent:
            yield sent

    async def read(self, request: Request, services: Served, caller: Caller, inflight: Bounded) -> AsyncIterator[M]:
        async with self._received(request, services.config.limits, caller, inflight) as sent:
            yield await off_loop(len(sent.content), sent.parse)

    @asynccontextmanager
    async def _received(
        self, request: Request, limits: LimitsSection, caller: Tenant, inflight: InFlight
    ) -> AsyncIterator[Sent[M]]:
        """The body, which is held until the route has done with it."""
        limit_bytes, option = self.model.limit_bytes(limits)
        hold = await inflight.take(caller.tenant_id, _expected_bytes(request, limit_bytes))
        try:
            yield Sent(self.model, *await read_bounded(request, limit_bytes, option, hold), limits)
        finally:
            hold.release()


if TYPE_CHECKING:
    JsonBody = Annotated[M, "read"]
    RawBody = Annotated[Sent[M], "received"]
else:

    class JsonBody:
        """``body: JsonBody[Model]`` is a Model."""

        def __class_getitem__(cls, model: type[M]) -> Any:
            return Annotated[model, Depends(Reader(model).read)]

    class RawBody:
        """``sent: RawBody[Model]`` is a Sent[Model], for those who parse it in parts."""

        def __class_getitem__(cls, model: type[M]) -> Any:
            return Annotated[Sent[model], Depends(Reader(model).receive)]


def _expected_bytes(request: Request, limit_bytes: int, num_bytes: int | None = None) -> int:
    """What the body and what it is parsed into may take; ``num_bytes`` if it is known how many there are."""
    if num_bytes is None:
        announced = request.headers.get("content-length", "")
        num_bytes = int(announced) if announced.isdecimal() else limit_bytes
    is_protobuf = "protobuf" in request.headers.get("content-type", "")
    return min(num_bytes, limit_bytes) * (_PARSED_BYTES_OF_PROTOBUF if is_protobuf else _PARSED_BYTES_OF_JSON)


async def read_bounded(request: Request, limit_bytes: int, option: str, hold: Hold) -> tuple[bytes, TooLarge | None]:
    """The body, or what fits of its beginning together with the error, which names the ``option``."""
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= limit_bytes:  # the rest is read and dropped: a sender who is cut off never sees our answer
            parts.append(part)
    content = b"".join(parts)
    oversize = _too_large(limit_bytes, option, "") if num_bytes > limit_bytes else None
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "zstd":
        await hold.change(_expected_bytes(request, limit_bytes, _decompressed_bytes(content)))
        content, bomb = await off_loop(len(content), _decompress, content, limit_bytes, option, oversize is not None)
        return content, oversize or bomb
    if encoding != "identity":
        raise InvalidInput("Content-Encoding", encoding, "must be zstd or absent")
    return content, oversize


async def off_loop(num_bytes: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do ``work`` on ``num_bytes`` of input: in a thread if that is much, so that others are served meanwhile."""
    if num_bytes > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


def parse(model: type[M], content: bytes, limits: LimitsSection | None = None) -> M:
    """``content`` as ``model``, within ``limits`` (default: the defaults); strings are not taken for numbers. Raises
    InvalidInput for the first field that is wrong."""
    try:
        fields = model.model_validate_json(content or b"{}", strict=True, context=limits)
    except ValidationError as error:
        raise invalid_input(error.errors(include_url=False)[0]) from error
    if _NUL in content and not model.holds_data:
        _refuse_nul(fields)
    return fields


def _refuse_nul(fields: Fields) -> None:
    """Ids, names and metadata hold none: not every database keeps it. Raises InvalidInput, which names the field."""
    left = list(fields.model_dump().items())
    while left:
        field, value = left.pop()
        if isinstance(value, str) and "\0" in value:
            raise InvalidInput(field, value, "must hold no NUL character")
        if isinstance(value, dict):
            left += [(field, key) for key in value]
            left += [(f"{field}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [(f"{field}.{number}", item) for number, item in enumerate(value)]


def invalid_input(problem: Mapping[str, Any]) -> InvalidInput:
    """One of pydantic's problems in the words of ours."""
    field = ".".join(str(part) for part in problem["loc"]) or "body"
    if problem["type"] == "missing":
        return InvalidInput(field, None, "is required")
    value = problem["input"]
    if problem["type"] == "json_invalid":
        value = _shown(value if isinstance(value, bytes) else str(value).encode())
    message = str(problem["msg"]).replace("Input should be", "must be").replace("Invalid JSON", "must be JSON")
    return InvalidInput(field, value, message)


def limits_of(info: ValidationInfo) -> LimitsSection:
    """What ``parse`` was given, for validators of fields."""
    return info.context or _DEFAULT_LIMITS


def check_count(items: Sized, field: str, limits: LimitsSection, limit: str) -> None:
    """Raises InvalidInput if there are more than ``limits.<limit>`` allows; a validator may call it."""
    most: int = getattr(limits, limit)
    if len(items) > most:
        raise InvalidInput(field, f"{len(items)} of them", f"must be at most {most} (limits.{limit})")


def _short_name(name: str, info: ValidationInfo) -> str:
    most = limits_of(info).max_name_chars
    if len(name) > most:
        raise PydanticCustomError("too_long", f"must have at most {most} characters (limits.max_name_chars)")
    return name


Name = Annotated[str, AfterValidator(_short_name)]
"""What a client calls something that it will find by this name."""


def texts(metadata: Mapping[str, Any] | None, limits: LimitsSection) -> dict[str, str]:
    """User metadata as the API shows it: values that are no texts become their JSON. Raises InvalidInput if it is more
    than a list of thousands could show."""
    found = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    num_bytes = sum(len(text.encode()) for pair in found.items() for text in pair)
    if num_bytes > limits.max_metadata_bytes:
        allowed = f"must be at most {limits.max_metadata_bytes} (limits.max_metadata_bytes)"
        raise InvalidInput("user_metadata", f"{num_bytes} bytes", allowed)
    return found


def utc(moment: datetime, field: str) -> datetime:
    """``moment`` in UTC, which one without a zone is taken to be in. Raises InvalidInput at the calendar's ends."""
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(field, moment.isoformat(), "must lie in the years 1 to 9999 (UTC)") from error


def _shown(content: bytes) -> str:
    return content[:60].decode(errors="replace")


def _too_large(limit_bytes: int, option: str, when: str) -> TooLarge:
    return TooLarge(f"body: it has more than {limit_bytes} bytes{when} ({option}); send less at once")


def _decompressed_bytes(content: bytes) -> int:
    """What the frame says; 0 where it says nothing that ``_decompress`` would take."""
    try:
        num_bytes = zstandard.get_frame_parameters(content).content_size
    except zstandard.ZstdError:
        return 0
    return 0 if num_bytes == zstandard.CONTENTSIZE_UNKNOWN else num_bytes


def _decompress(content: bytes, limit_bytes: int, option: str, cut_off: bool) -> tuple[bytes, TooLarge | None]:
    """One zstd frame that declares its size, as the SDK sends it; of a larger or ``cut_off`` one, the beginning."""
    try:
        num_bytes = zstandard.get_frame_parameters(content).content_size
        if num_bytes == zstandard.CONTENTSIZE_UNKNOWN:
            raise InvalidInput("body", "a zstd frame of unknown size", "the frame must declare its content size")
        if cut_off or num_bytes > limit_bytes:
            with zstandard.ZstdDecompressor().stream_reader(content) as reader:
                return reader.read(min(_PREFIX_BYTES, num_bytes)), _too_large(limit_bytes, option, " when decompressed")
        return zstandard.ZstdDecompressor().decompress(content, allow_extra_data=False), None
    except zstandard.ZstdError as error:
        raise InvalidInput("body", f"{len(content)} bytes", f"must be one zstd frame: {error}") from error
