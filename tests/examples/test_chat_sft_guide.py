"""The guide and the notebook say what the code does."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]
CHAT_SFT = REPOSITORY / "examples" / "chat_sft"
GUIDE = REPOSITORY / "docs" / "guides" / "chat-sft.md"
MODULES = ("answers", "chat_sft", "conversations", "curves", "render", "settings")
IN_THE_FILES = "\n".join((CHAT_SFT / f"{module}.py").read_text() for module in MODULES)


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)


def own_names() -> set[str]:
    """Functions and classes of the example."""
    return {
        name
        for module in MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if getattr(value, "__module__", None) == module
    }


def called_names(tree: ast.AST) -> set[str]:
    return {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    }


def notebook_code() -> list[str]:
    notebook = nbformat.read(CHAT_SFT / "chat_sft.ipynb", as_version=4)
    nbformat.validate(notebook)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_in_the_guide_compiles(block: str) -> None:
    ast.parse(block)


def test_the_lines_the_guide_quotes_stand_in_the_script() -> None:
    own_lines = {line.strip() for line in IN_THE_FILES.splitlines()}
    quoted = [block for block in code_blocks("python") if not block.startswith(("service", "client ="))]
    assert len(quoted) >= 5
    # A quotation may leave out type annotations, say `datum =` for `return`, and name an argument by its meaning.
    allowed = {
        "def masked_nll(output, data):",
        "datum = tinker.Datum(",
        "in_flight.append(submit_step(client, step, batch, measured, learning_rate))",
    }

    foreign = [line for block in quoted for line in map(str.strip, block.splitlines()) if line not in own_lines]

    assert set(foreign) == allowed


def test_every_name_in_backticks_that_looks_like_ours_exists() -> None:
    mentioned = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", GUIDE.read_text()))
    of_the_sdk = {"train_mlp", "train_attn", "forward_backward", "optim_step", "create_training_client_from_state"}
    losses = {"cross_entropy"}

    assert mentioned - own_names() - of_the_sdk - losses == {"no_robots"} & mentioned


def test_every_option_in_the_guide_is_an_option_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    from settings import parse_settings

    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    of_others = {"--tenant", "--user", "--name"}

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE.read_text())) - of_others <= known


def test_the_notebook_goes_the_way_of_the_script() -> None:
    script = ast.parse((CHAT_SFT / "chat_sft.py").read_text())
    run = next(node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    notebook = called_names(ast.parse("\n".join(notebook_code())))

    steps = called_names(run) & own_names() - {"describe"}

    assert len(steps) >= 10
    assert steps <= notebook


def test_the_notebook_imports_only_what_exists() -> None:
    for node in ast.walk(ast.parse("\n".join(notebook_code()))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_the_notebook_is_shipped_without_outputs() -> None:
    notebook = nbformat.read(CHAT_SFT / "chat_sft.ipynb", as_version=4)

    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
