"""All ways to compute what stands between the matrix products, for tests that hold for each."""

from __future__ import annotations

import pytest

from tuft.models.accelerated import AcceleratedOps
from tuft.models.compiled import CompiledOps
from tuft.models.ops import EagerOps, Ops

EAGER, COMPILED, ACCELERATED = EagerOps(), CompiledOps(), AcceleratedOps()
_ON_CPUS: dict[str, Ops] = {"torch": EAGER, "kernels": COMPILED}
_ALL: dict[str, Ops] = {**_ON_CPUS, "accelerated": ACCELERATED}
each_ops = pytest.mark.parametrize("ops", _ON_CPUS.values(), ids=_ON_CPUS)
"""What CPUs compute with: whatever happens beside a row, it has the same bits."""
every_ops = pytest.mark.parametrize("ops", _ALL.values(), ids=_ALL)
"""Also what GPUs compute with."""
