"""What a pass takes of the host's memory, beside what is predicted and promised to be refused or cut.

A process of its own for each size: it loads the base model, computes one short pass, and then one of so many tokens;
the figure is how far the resident memory rises above what it was in between. Up to ``micro_batch_tokens`` activations
are kept for the backward; a longer sequence computes them anew.
"""

from __future__ import annotations

import ctypes
import re
from multiprocessing import get_context
from pathlib import Path

from bench import kernels, ours
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import BaseModel, Text, datum_of
from tuft.engine.base import RunLoss
from tuft.footprint import gradient_bytes
from tuft.models.decoder import Precision
from tuft.types import LoraSpec, LossResult, MemoryShares

MODULE = "bench.memory"
RANK = 32
WARM_UP_TOKENS = 64
LENGTHS = (512, 1024, 2048, 8192)
PRECISIONS: tuple[Precision, ...] = ("bf16", "float32")


def status_bytes(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measured(base: BaseModel, precision: Precision, length: int) -> tuple[int, int, bool]:
    """Bytes predicted, bytes taken, and whether activations were kept."""
    model = ours.load(base, precision)
    memory = model.info.memory
    assert memory is not None
    adapters = ours.adapters_of(model, LoraSpec(rank=RANK, seed=1), 1, trainable=True)
    text = Text.of_chats(base)

    def compute(num_tokens: int) -> None:
        part = RunLoss("0", (datum_of(text, num_tokens),), "cross_entropy", operation_id=str(num_tokens))
        ((_, result),) = model.trainer.run([part], adapters)
        assert isinstance(result, LossResult), result
        adapters["0"].gradients_P = None

    compute(WARM_UP_TOKENS)
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would be taken first
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    compute(length)
    predicted = predicted_bytes(memory, length, adapters["0"].layout.num_parameters)
    return predicted, status_bytes("VmHWM") - before, length <= memory.pass_tokens


def predicted_bytes(memory: MemoryShares, length: int, num_parameters: int) -> int:
    row_bytes = memory.row_bytes if length <= memory.pass_tokens else memory.long_row_bytes
    return length * row_bytes + memory.fixed_bytes + gradient_bytes(num_parameters)


def main() -> None:
    options = arguments(MODULE, __doc__, rounds=1).parse_args()
    base = BaseModel.embedded()
    kernels.compiled()
    rows, ratios = [], []
    for precision in PRECISIONS:
        for length in LENGTHS:
            with get_context("spawn").Pool(1) as process:
                predicted, taken, kept = process.apply(measured, (base, precision, length))
            ratios.append(taken / predicted)
            how = "kept" if kept else "anew"
            rows.append(
                (precision, length, how, f"{predicted / 2**20:.0f}", f"{taken / 2**20:.0f}", f"{ratios[-1]:.2f}")
            )
    sections = [
        f"{base.name}, one sequence, LoRA rank {RANK} on all layers.",
        table(("precision", "tokens", "activations", "predicted MiB", "taken MiB", "taken / predicted"), rows),
        judged_table([Judged("most of a prediction that was taken", max(ratios), 1.0, 0.95, is_limit=True)]),
    ]
    publish(MODULE, "Memory of a pass", sections, options.markdown)


if __name__ == "__main__":
    main()
