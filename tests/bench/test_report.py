"""What a benchmark says of its figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.report import Judged, judged_table, publish, table


@pytest.mark.parametrize(
    ("figure", "is_limit", "verdict"),
    [
        (1.9, False, "**not met**"),
        (2.0, False, "met"),
        (4.0, False, "aim"),
        (4.1, True, "**not met**"),
        (4.0, True, "met"),
        (2.0, True, "aim"),
    ],
)
def test_a_figure_is_judged_by_what_must_and_what_should_be_reached(
    figure: float, is_limit: bool, verdict: str
) -> None:
    must, aim = (4.0, 2.0) if is_limit else (2.0, 4.0)
    judged = Judged("speed", figure, must, aim, is_limit=is_limit)
    assert judged.verdict == verdict
    assert judged_table([judged]).splitlines()[-1].endswith(f"| {verdict} |")


def test_nothing_judged_is_no_table() -> None:
    assert judged_table([]) == ""


def test_a_table_has_a_line_for_every_row() -> None:
    assert table(("a", "b"), [(1, "x"), (2, "y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_a_report_goes_above_older_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.md"
    file.write_text("# Results\n\nWhat this is.\n")
    for title in ("First", "Second"):
        publish("bench.sample", title, [f"what the {title} found", ""], file)
    text = file.read_text()
    assert re.findall(r"^## (\w+), \d{4}-\d\d-\d\d$", text, re.MULTILINE) == ["Second", "First"]
    assert text.startswith("# Results\n\nWhat this is.\n\n## Second")
    assert "`python -m bench.sample" in text
    assert "\n\nwhat the Second found\n\n## First" in text
    assert "what the First found\n" in capsys.readouterr().out
