"""Both ways to compute what stands between the matrix products, for tests that hold for either."""

from __future__ import annotations

import pytest

from tuft.models.compiled import CompiledOps
from tuft.models.ops import EagerOps, Ops

EAGER, COMPILED = EagerOps(), CompiledOps()
OPS: dict[str, Ops] = {"torch": EAGER, "kernels": COMPILED}
each_ops = pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
