"""The committed generated code is what wire.proto says, and its numbers are those of the SDK."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from grpc_tools import protoc
from tinker.proto import tinker_public_pb2

from tuft.api.proto import wire_pb2

ROOT = Path(__file__).parents[2]
FOLDER = "tuft/api/proto"


@pytest.mark.parametrize("generated", ["wire_pb2.py", "wire_pb2.pyi"])
def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path, generated: str) -> None:
    plugin = Path(sys.executable).with_name("protoc-gen-mypy")
    options = [f"-I{ROOT}", f"--plugin={plugin}", f"--python_out={tmp_path}", f"--mypy_out={tmp_path}"]
    assert protoc.main(["protoc", *options, str(ROOT / FOLDER / "wire.proto")]) == 0
    assert (ROOT / FOLDER / generated).read_text() == (tmp_path / FOLDER / generated).read_text()


@pytest.mark.parametrize("name", sorted(wire_pb2.DESCRIPTOR.message_types_by_name))
def test_every_field_is_the_sdks_own(name: str) -> None:
    ours: Descriptor = wire_pb2.DESCRIPTOR.message_types_by_name[name]
    theirs: Descriptor = tinker_public_pb2.DESCRIPTOR.message_types_by_name[name]
    for field in ours.fields:
        other = theirs.fields_by_number[field.number]
        assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated)


def test_our_package_does_not_clash_with_the_sdks() -> None:
    assert wire_pb2.DESCRIPTOR.package == "tuft.wire.v1"
