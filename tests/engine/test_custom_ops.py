"""The allow-list: all of it works, stays within its bounds, and leads nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tuft.engine.custom_bounds import TENSOR_ELEMENTS, indexed, is_number, tensors_of
from tuft.engine.custom_ops import FUNCTIONS, METHODS, Operator

T, K = 6, 4
X, Y, ROW = torch.linspace(0.1, 0.9, T), torch.linspace(0.5, 0.2, T), torch.linspace(0.1, 0.5, K)
GRID = torch.linspace(0.1, 0.9, T * K).reshape(T, K)
SQUARE = torch.linspace(0.1, 0.9, T * T).reshape(T, T)
INDEX, MASK = torch.tensor([5, 0, 3]), X > 0.4


def calls() -> Iterator[tuple[Any, ...]]:
    """Arguments, of which every operator takes some."""
    for x in (X, GRID, SQUARE):
        yield from [(x,), (x, x), (x, 2), (x, 0), (x, -1), (x, 1.5), (x, torch.float64), (x, 3, 2), (x, 0, 1)]
        yield from [(x, (0,)), (x, x, 1), (x, x, x), (x, 0, INDEX), (x, 0, INDEX, x[:3]), (x, 0, 1, 3), (x, 0.0, 1.0)]
        yield from [(x, (0, 2)), (x, "shape"), (x, (T,)), (x, x > 0.4), (x, x > 0.4, 0.0), (x > 0.4, x, 0.0), ([x, x],)]
        yield from [(x, x.argsort(0)), (x, 0, x.argsort(0)), (x, 0, x.argsort(0), x), (x, INDEX), (x, x.long())]
        yield from [(x.long(), x.long()), (x > 0.4, x > 0.2), (x.long(),), (x.float(), 1, 0), (x, 0, (2, -1))]
    yield from [(GRID, ROW), (X, Y), (GRID[None], GRID.t()[None]), (GRID, GRID.t()), (X, GRID), (SQUARE, X), (3, 4.0)]
    yield from [(2, 3), (0.5,), ((2, 3), 1.5), (5,), (1, 9, 2), (0, 1, 5), (X, (3, T), 0), (X, 2, 3), (X, (2, -1))]
    yield from [(X, 3, -1), (GRID.log(), INDEX.repeat(2) % K), (X, (slice(1, None), None)), (GRID, (..., INDEX[:2]))]


def attempts(operator: Operator) -> Iterator[tuple[int, Any]]:
    for args in calls():
        if len(args) <= operator.most_args:
            try:
                most, result = operator.bound(*args), operator.function(*args)
            except (TypeError, ValueError, IndexError, RuntimeError, AttributeError, ZeroDivisionError):
                continue  # other arguments are for this one
            yield most, result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *METHODS}))
def test_an_operator_gives_values_within_its_bound(name: str) -> None:
    found = 0
    for table in (FUNCTIONS, METHODS):
        if name not in table:
            continue
        for most, result in attempts(table[name]):
            assert list(tensors_of(result)) or isinstance(result, tuple | str) or is_number(result)
            assert sum(tensor.numel() for tensor in tensors_of(result)) <= max(most, 1)
            found += 1
    assert found
    assert X.tolist() == torch.linspace(0.1, 0.9, T).tolist()  # nothing works in place
    assert GRID.tolist() == torch.linspace(0.1, 0.9, T * K).reshape(T, K).tolist()


@pytest.mark.parametrize(
    "index",
    [
        *(0, -1, slice(None, None, 2), None, ..., MASK, INDEX, (None, ...), (INDEX, INDEX[:, None]), (MASK, 0)),
        *((slice(1, 3), INDEX[:2]), (..., INDEX[:1].repeat(9)), (INDEX, slice(None)), (INDEX, None, INDEX[:, None])),
        *(
            (MASK, slice(None)),
            (None, INDEX, ...),
            GRID > 0.3,
            (GRID > 0.3, None),
            torch.zeros(5, 5, dtype=torch.int64),
        ),
    ],
    ids=str,
)
def test_the_bound_of_an_index_holds(index: Any) -> None:
    clipped = (
        index
        if not isinstance(index, tuple)
        else tuple(i.clamp(max=K - 1) if isinstance(i, torch.Tensor) and i.dtype == torch.int64 else i for i in index)
    )
    assert GRID[clipped].numel() <= indexed(GRID, clipped) <= 30 * GRID.numel()


def test_pieces_are_counted_as_tensors() -> None:
    assert METHODS["unbind"].bound(X) >= T * TENSOR_ELEMENTS
    assert METHODS["split"].bound(GRID, 1, 1) >= K * TENSOR_ELEMENTS


def test_a_long_product_counts_as_what_it_costs() -> None:
    a = torch.empty(1).expand(2**12, 2**12)
    assert FUNCTIONS["torch.matmul"].bound(a, a) == 2**24 * 2**12 // 64


def test_nothing_in_the_allow_list_reaches_python_or_works_in_place() -> None:
    names = {name.rpartition(".")[2] for name in FUNCTIONS} | METHODS.keys()
    assert {name for name in names if name.startswith("__")} == set()
    assert {name for name in names if name.endswith("_")} == {"and_", "or_"}
    for forbidden in (
        "item tolist numpy apply load save empty empty_like new_empty rand dropout setitem data_ptr "
        "as_strided set resize map register_hook backward share_memory storage pin_memory cuda"
    ).split():
        assert forbidden not in names
    assert all(callable(operator.function) for table in (FUNCTIONS, METHODS) for operator in table.values())
    assert {name.rpartition(".")[0] for name in FUNCTIONS} <= {
        *("", "torch", "torch.functional", "torch.nn.functional", "torch.special", "torch.linalg", "math", "operator"),
        *("torch._C._nn", "torch._C._special", "torch._C._linalg"),
    }
    assert math.factorial not in {operator.function for operator in FUNCTIONS.values()}
