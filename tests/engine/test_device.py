"""Choice of device and precision, and memory that is kept."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from tuft.engine.base import EngineSettings
from tuft.engine.device import choose_device, choose_precision, settled
from tuft.errors import ConfigError


def test_the_cpu_can_always_be_chosen() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("wanted", ["tpu", "mps", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_here_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device"):
        choose_device(wanted)


def test_what_settings_leave_open_is_what_suits_the_device() -> None:
    assert settled(EngineSettings(device="cpu", micro_batch_tokens=0)).micro_batch_tokens == 1024
    assert settled(EngineSettings(device="cpu", micro_batch_tokens=300)).micro_batch_tokens == 300


def test_gpu_memory_for_adapters_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(ConfigError, match=r"engine\.adapter_memory_gib: got 2; needs a GPU"):
        settled(EngineSettings(device="cpu", adapter_memory_gib=2.0))


def test_auto_precision_is_bf16_only_where_the_hardware_has_it() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == "float32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("auto", cpu) == ("bf16" if torch.cpu._is_avx512_bf16_supported() else "float32")


_COUNT_FAULTS = """
import resource, sys, torch
from tuft.engine.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return sum(float(torch.ones(10_000_000).sum()) for _ in range(5))
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_second_step_reuses_the_memory_of_the_first() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", _COUNT_FAULTS, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages_of_one_tensor = 40_000_000 // resource.getpagesize()
    assert faults("keep") < pages_of_one_tensor < faults("default")
