"""Releases other than those of this environment, each in a virtual environment of its own that is kept.

python = venv_python("tinker-0.8.1", "tinker==0.8.1")   # made the first time, about 3 s; found the next time

What such an environment does not hold itself is found in this one, after its own: pip installs what differs, and torch
is on the disk once.
"""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".pytest_cache" / "venvs"


def venv_python(name: str, *requirements: str) -> Path:
    """The interpreter of the environment ``name`` that has ``requirements``; made anew when any of it changed."""
    directory = KEPT / name
    python = directory / "bin" / "python"
    ready = directory / "made-of.json"
    ours = site.getsitepackages()
    made_of = json.dumps([*requirements, *ours, (ROOT / "constraints.txt").read_text()])
    if ready.exists() and ready.read_text() == made_of:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "zz_what_is_not_here.pth").write_text("\n".join(ours))
    # --no-compile: python compiles what it imports, which is little of it
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", *requirements], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    ready.write_text(made_of)
    return python
