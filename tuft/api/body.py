"""Request bodies: read within a limit, decompressed within the same limit, parsed into models that forgive unknown
fields and name what is wrong with known ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, ParamSpec, TypeVar

import zstandard
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuft.api.auth import Caller, Served
from tuft.errors import InvalidInput, TooLarge

CONTROL_BODY_BYTES = 2**20
"""Enough for every body that carries neither training data nor a prompt."""
ClientSeq = Annotated[int, Field(ge=0, lt=2**63)]
"""What clients count their runs, samplers and samples with."""
MAX_METADATA_BYTES = 2**14
_OFF_LOOP_BYTES = 2**20
_PREFIX_BYTES = 2**16

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="Fields")
N = TypeVar("N", bound="Fields")


class Fields(BaseModel):
    """Base of the JSON bodies. Unknown fields are ignored, so that a newer SDK does not break us; a field that is left
    out has the SDK's own default, since old SDKs leave defaults out."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    holds_data: ClassVar[bool] = False
    """Training data, a prompt, or a list of many: as large as ``limits.max_request_bytes``."""
    is_protobuf_too: ClassVar[bool] = False
    one_of: ClassVar[tuple[type[Fields], ...]] = ()
    """The whole bodies, where this model only tells them apart."""


@dataclass(frozen=True, slots=True)
class Sent(Generic[M]):
    """A body as it came, decompressed. With ``oversize``, ``content`` is but its beginning."""

    model: type[M]
    content: bytes
    oversize: TooLarge | None

    def parse(self) -> M:
        """Raises InvalidInput or TooLarge."""
        return self.parse_as(self.model)

    def parse_as(self, part: type[N]) -> N:
        """The fields of a smaller model, whatever the others are."""
        if self.oversize is not None:
            raise self.oversize
        return parse(part, self.content)


class Reader(Generic[M]):
    """What a route depends on for its body, once it is known who calls; ``api.document`` shows ``model``."""

    def __init__(self, model: type[M]) -> None:
        self.model = model

    async def receive(self, request: Request, services: Served, _: Caller) -> Sent[M]:
        limit_bytes = services.config.limits.max_request_bytes if self.model.holds_data else CONTROL_BODY_BYTES
        return Sent(self.model, *await read_bounded(request, limit_bytes))

    async def read(self, request: Request, services: Served, _: Caller) -> M:
        sent = await self.receive(request, services, _)
        return await off_loop(len(sent.content), sent.parse)


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


async def read_bounded(request: Request, limit_bytes: int) -> tuple[bytes, TooLarge | None]:
    """The body, or what fits of its beginning together with the error."""
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= limit_bytes:  # the rest is read and dropped: a sender who is cut off never sees our answer
            parts.append(part)
    content = b"".join(parts)
    oversize = _too_large(limit_bytes, "") if num_bytes > limit_bytes else None
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "zstd":
        content, bomb = await off_loop(len(content), _decompress, content, limit_bytes, oversize is not None)
        return content, oversize or bomb
    if encoding != "identity":
        raise InvalidInput("Content-Encoding", encoding, "must be zstd or absent")
    return content, oversize


async def off_loop(num_bytes: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do ``work`` on ``num_bytes`` of input: in a thread if that is much, so that others are served meanwhile."""
    if num_bytes > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


def parse(model: type[M], content: bytes) -> M:
    """``content`` as ``model``; strings are not taken for numbers. Raises InvalidInput for the first field that is
    wrong."""
    try:
        return model.model_validate_json(content or b"{}", strict=True)
    except ValidationError as error:
        raise invalid_input(error.errors(include_url=False)[0]) from error


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


def texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """User metadata as the API shows it: values that are no texts become their JSON. Raises InvalidInput if it is more
    than a list of thousands could show."""
    found = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    num_bytes = sum(len(text.encode()) for pair in found.items() for text in pair)
    if num_bytes > MAX_METADATA_BYTES:
        raise InvalidInput("user_metadata", f"{num_bytes} bytes", f"must be at most {MAX_METADATA_BYTES}")
    return found


def utc(moment: datetime, field: str) -> datetime:
    """``moment`` in UTC, which one without a zone is taken to be in. Raises InvalidInput at the calendar's ends."""
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput(field, moment.isoformat(), "must lie in the years 1 to 9999 (UTC)") from error


def _shown(content: bytes) -> str:
    return content[:60].decode(errors="replace")


def _too_large(limit_bytes: int, when: str) -> TooLarge:
    return TooLarge(f"body: it has more than {limit_bytes} bytes{when}; send less at once")


def _decompress(content: bytes, limit_bytes: int, cut_off: bool) -> tuple[bytes, TooLarge | None]:
    """One zstd frame that declares its size, as the SDK sends it; of a larger or ``cut_off`` one, the beginning."""
    try:
        num_bytes = zstandard.get_frame_parameters(content).content_size
        if num_bytes == zstandard.CONTENTSIZE_UNKNOWN:
            raise InvalidInput("body", "a zstd frame of unknown size", "the frame must declare its content size")
        if cut_off or num_bytes > limit_bytes:
            with zstandard.ZstdDecompressor().stream_reader(content) as reader:
                return reader.read(min(_PREFIX_BYTES, num_bytes)), _too_large(limit_bytes, " when decompressed")
        return zstandard.ZstdDecompressor().decompress(content, allow_extra_data=False), None
    except zstandard.ZstdError as error:
        raise InvalidInput("body", f"{len(content)} bytes", f"must be one zstd frame: {error}") from error
