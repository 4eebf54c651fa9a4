"""Products of bf16 on CPUs that have no instruction for them: the same kernels, compiled as for such a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
features["avx512bf16"] = False
llvm.get_host_cpu_features = lambda: features
import torch
from tuft.models.kernels import native
assert not native.HAS_BF16
from tests.models import test_lora_linear as lora
for ranks, sizes in (((8, 8, 24, 16), (64, 32, 96)), ((4, 4, 7, 1), (40, 20, 37))):
    for key in lora.KEYS:
        lora.test_every_segment_has_the_product_of_its_adapter(ranks, sizes, key, torch.bfloat16, 1.5e-2, "kernels")
"""


@pytest.mark.slow
def test_without_the_instruction_products_are_as_exact(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=280, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
