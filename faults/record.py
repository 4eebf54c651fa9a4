"""What an experiment has to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil


@dataclass(frozen=True)
class Record:
    """``injected`` was done ``times`` times; of what was promised, ``lost`` was not kept. ``measured`` has units in its
    names; ``broken`` says which promises the figures do not keep."""

    name: str
    injected: str
    times: int
    lost: int
    measured: Mapping[str, float]
    broken: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        return not self.lost and not self.broken

    def __str__(self) -> str:
        figures = "  ".join(f"{name} {value:g}" for name, value in self.measured.items())
        verdict = (
            "holds"
            if self.holds
            else "BROKEN: " + "; ".join((*self.broken, *([f"{self.lost} lost"] * bool(self.lost))))
        )
        return f"{self.name}: {self.injected} x {self.times:,}, lost {self.lost}\n    {figures}\n    {verdict}"


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered) - 1e-9) - 1)] if ordered else 0.0
