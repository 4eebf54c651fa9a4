"""Linears with adapters, by torch's products and by kernels: against the definition, and rows that do not depend on
their batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU
from tuft.models.compiled_lora import CompiledLora
from tuft.models.grouped_lora import GroupedLora
from tuft.models.lora import Adapter, LoraViews, Segment
from tuft.models.lora_linear import LoraProducts
from tuft.models.segments import LoraKernels
from tuft.types import LoraSpec

KERNELS: dict[str, LoraKernels | None] = {"torch": None, "kernels": CompiledLora(), "grouped": GroupedLora()}
KEYS = ("0.qkv", "0.o", "0.gate_up", "0.down")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_shapes(hidden: int, kv: int, inner: int) -> dict[str, tuple[int, int]]:
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.0.{name}": size for name, size in sizes.items()} | {"lm_head": (40, hidden)}


def new_adapter(shapes: dict[str, tuple[int, int]], rank: int, seed: int, train_mlp: bool = True) -> Adapter:
    adapter = Adapter(shapes, LoraSpec(rank=rank, train_mlp=train_mlp), CPU)
    adapter.params_P.copy_(random(len(adapter.params_P), seed=seed))
    return adapter


def new_segment(adapter: Adapter, start: int, stop: int) -> Segment:
    return Segment(adapter, start, stop, adapter.layout.views(torch.zeros_like(adapter.params_P)))


def gradients(segment: Segment) -> LoraViews:
    assert segment.gradients is not None
    return segment.gradients


def run(
    kernels: LoraKernels | None, segments: Sequence[Segment], key: str, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """``y + lora(x)`` and ``dx``, starting from zeros, with ``inputs`` x, y and dy."""
    x_TK, y_TN, dy_TN = inputs
    out_TN, dx_TK = y_TN.clone(), torch.zeros_like(x_TK)
    products = LoraProducts(segments, x_TK.dtype, kernels)
    kept = products.add(out_TN, x_TK, key)
    products.backward(dy_TN, x_TK, dx_TK, key, kept)
    return out_TN, dx_TK


def inputs_of(shapes: dict[str, tuple[int, int]], key: str, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    group = new_adapter(shapes, 1, 0).views(torch.float32)[key]
    out_features = sum(B_Nr.shape[0] for B_Nr in group.Bs_Nr)
    sizes = (group.A_RK.shape[1], out_features, out_features)
    return tuple(random(num_rows, size, seed=seed).to(dtype) for seed, size in enumerate(sizes))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("sizes", [(64, 32, 96), (40, 20, 37)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4, 7, 1), (8, 8, 24, 16)], ids=str)
def test_every_segment_has_the_product_of_its_adapter(
    ranks: tuple[int, ...],
    sizes: tuple[int, int, int],
    key: str,
    dtype: torch.dtype,
    tolerance: float,
    kernels: str,
) -> None:
    """Rows without a segment, neighbours that are alike, one adapter that does not train the MLP."""
    shapes = linear_shapes(*sizes)
    adapters = [new_adapter(shapes, rank, rank + n, train_mlp=n != 2) for n, rank in enumerate(ranks)]
    bounds = ((0, 20), (20, 33), (33, 50), (60, 61))
    segments = [new_segment(a, *rows) for a, rows in zip(adapters, bounds, strict=True)]
    x_TK, y_TN, dy_TN = inputs_of(shapes, key, 70, dtype)
    out_TN, dx_TK = run(KERNELS[kernels], segments, key, (x_TK, y_TN, dy_TN))

    expected_y, expected_dx = y_TN.double(), torch.zeros(70, x_TK.shape[1], dtype=torch.float64)
    for segment in segments:
        group = segment.adapter.views(dtype).get(key)
        if group is None:
            continue
        rows = slice(segment.start, segment.stop)
        x, dy, scale = x_TK[rows].double(), dy_TN[rows].double(), segment.adapter.spec.scale
        column = 0
        for number, (A_rK, B_Nr) in enumerate(zip(group.A_RK.chunk(len(group.Bs_Nr)), group.Bs_Nr, strict=True)):
            A, B, width = A_rK.double(), B_Nr.double(), len(B_Nr)
            dy_N = dy[:, column : column + width]
            expected_y[rows, column : column + width] += scale * x @ A.t() @ B.t()
            expected_dx[rows] += scale * dy_N @ B @ A
            gradient = gradients(segment)[key]
            assert relative(gradient.A_RK.chunk(len(group.Bs_Nr))[number], scale * (dy_N @ B).t() @ x) < tolerance
            assert relative(gradient.Bs_Nr[number], scale * dy_N.t() @ (x @ A.t())) < tolerance
            column += width
    assert relative(out_TN, expected_y) < tolerance
    assert relative(dx_TK, expected_dx) < tolerance
    assert torch.equal(out_TN[61:], y_TN[61:])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17, 64, 150])
def test_a_segment_is_bit_equal_beside_others(num_rows: int, dtype: torch.dtype, kernels: str) -> None:
    shapes = linear_shapes(576, 192, 1536)
    mine, others = new_adapter(shapes, 8, 1), [new_adapter(shapes, rank, rank) for rank in (8, 20)]
    for key in KEYS:
        inputs = inputs_of(shapes, key, num_rows + 50, dtype)
        rows = slice(13, 13 + num_rows)
        alone, fused = new_segment(mine, 0, num_rows), new_segment(mine, rows.start, rows.stop)
        segments = [new_segment(others[0], 0, 13), fused, new_segment(others[1], rows.stop, num_rows + 50)]
        y_TN, dx_TK = run(KERNELS[kernels], segments, key, inputs)
        x, y, dy = (tensor[rows] for tensor in inputs)
        y_tN, dx_tK = run(KERNELS[kernels], [alone], key, (x, y, dy))
        assert torch.equal(y_TN[rows], y_tN)
        assert torch.equal(dx_TK[rows], dx_tK)
        assert torch.equal(gradients(fused)[key].A_RK, gradients(alone)[key].A_RK)
        for ours, theirs in zip(gradients(fused)[key].Bs_Nr, gradients(alone)[key].Bs_Nr, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernels", ["torch", "kernels"])  # grouped products hold it for whole segments only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 9, 11, 12, 33])
def test_a_row_of_a_lora_product_does_not_depend_on_the_other_rows(
    num_rows: int, dtype: torch.dtype, kernels: str
) -> None:
    shapes = linear_shapes(576, 192, 1536)
    adapter = new_adapter(shapes, 8, 1)
    for key in KEYS:
        x_TK, y_TN, _ = inputs_of(shapes, key, 60, dtype)

        def added(first: int, last: int, key: str = key, x_TK: Tensor = x_TK, y_TN: Tensor = y_TN) -> Tensor:
            y = y_TN[first:last].clone()
            products = LoraProducts([Segment(adapter, 0, last - first)], dtype, KERNELS[kernels])
            products.add(y, x_TK[first:last], key)
            return y

        assert torch.equal(added(6, 6 + num_rows), added(0, 60)[6 : 6 + num_rows])
