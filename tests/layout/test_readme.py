"""The README is true: its commands exist, its tree is the tree, its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import LiveServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def test_the_first_commands_are_targets_of_the_makefile() -> None:
    first = re.findall(r"^make (\w+)", blocks("")[0], re.MULTILINE)
    assert first == ["demo", "test"]
    for target in first:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_module_has_its_line_in_the_tree() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("tuft/")]
    shown, folders = set(), {2: ROOT / "tuft"}
    for line in tree.splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            break
        path = folders[indent] / name
        if name.endswith("/"):
            folders[indent + 2] = path
        else:
            shown.add(str(path.relative_to(ROOT)))
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tuft").rglob("*.py")
        if not path.name.startswith("__") and not {"proto", "migrations"} & set(path.parts)
    }
    assert shown == modules


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_first_screens_code_runs_as_written(
    embedded_server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    code = blocks("python")[0]
    assert len(code.splitlines()) <= 16
    code = code.replace("http://localhost:10610", embedded_server.url).replace("tml-...", embedded_server.key)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    losses = [float(line.split()[1]) for line in printed.splitlines() if re.match(r"\d+ [\d.]+$", line)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert "SampleResponse" in printed
