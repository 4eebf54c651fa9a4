"""``ops.Ops`` for a GPU: torch's operators, and where many small calls would cost more than what they compute, few."""

from __future__ import annotations

from tuft.models.grouped_lora import GroupedLora
from tuft.models.ops import EagerOps
from tuft.models.segments import LoraKernels


class AcceleratedOps(EagerOps):
    """Adapters by grouped products, packed sequences by flash kernels, decode steps replayed as graphs. All of it also
    runs on a CPU, where only tests want it: there graphs are computed step by step."""

    def __init__(self) -> None:
        self.lora: LoraKernels | None = GroupedLora()
        self.has_flash_attention = self.has_decode_graphs = True
