"""How many elements the result of an operator may have at most, or how much work it is if that is more, from its
arguments and before it runs. A bound takes the arguments of its operators, and raises what they might."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TENSOR_ELEMENTS = 256
"""What a tensor takes beside its elements, in elements."""
_PRODUCTS_OF_AN_ELEMENT = 64
"""Multiplications that take as long as writing an element."""


def is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


def tensors_of(values: object) -> Iterator[Tensor]:
    """The tensors among arguments or a result, also within lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_of(value)


def broadcast(*args: Any, **kwargs: Any) -> int:
    shapes = {tensor.shape for tensor in tensors_of((args, tuple(kwargs.values())))}
    return math.prod(torch.broadcast_shapes(*shapes) if len(shapes) > 1 else next(iter(shapes), ()))


def largest(*args: Any, **kwargs: Any) -> int:
    return max((tensor.numel() for tensor in tensors_of((args, tuple(kwargs.values())))), default=0)


def pairs(*args: Any, **kwargs: Any) -> int:
    """Two tensors: values and their indices, mean and deviation, ..."""
    return 2 * broadcast(*args, **kwargs)


def chosen(condition: Tensor, *others: Any) -> int:
    """A condition alone would give a tensor for each of its dimensions."""
    if len(others) != 2:
        raise TypeError("takes a condition and two values")
    return broadcast(condition, *others)


def together(*args: Any, **kwargs: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_of((args, tuple(kwargs.values()))))


def _product(*sizes: Any) -> int:
    """Of sizes as torch takes them: ``2, 3`` or ``(2, 3)``, after which a value may come."""
    if sizes and isinstance(sizes[0], list | tuple):
        sizes = tuple(sizes[0])
    if not all(type(size) is int for size in sizes):
        raise TypeError(f"sizes must be integers, not {sizes}")
    return math.prod(max(size, 1) for size in sizes)


def filled(*sizes: Any, size: Any = (), **_: Any) -> int:
    return _product(*sizes) * _product(size)


def new(_x: Tensor, *sizes: Any, size: Any = (), **_: Any) -> int:
    return _product(*sizes) * _product(size)


def repeated(x: Tensor, *sizes: Any) -> int:
    return x.numel() * _product(*sizes)


def expanded(x: Tensor, *sizes: Any) -> int:
    """-1 leaves a dimension as it is."""
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    kept = [length for length, size in zip(reversed(x.shape), reversed(wanted), strict=False) if size == -1]
    return _product(*wanted) * math.prod(kept)


def repeated_each(x: Tensor, repeats: Any, *_: Any, **__: Any) -> int:
    return x.numel() * _product(repeats)


def stepped(start: Any, end: Any = None, step: Any = 1, **_: Any) -> int:
    first, last = (0, start) if end is None else (start, end)
    numbers(first, last, step)
    return int(abs(last - first) / abs(step)) + 1


def spaced(_start: Any, _end: Any, steps: int, **_: Any) -> int:
    return _product(steps)


def padded(x: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> int:
    sizes = list(x.shape)
    for index, width in enumerate(pad):
        sizes[-1 - index // 2] += max(width, 0)
    return _product(*sizes)


def viewed(x: Tensor, *sizes: Any) -> int:
    """Not with a dtype, of which there might be more."""
    _product(*sizes)
    return x.numel()


def pieces(x: Tensor, *_: Any, **__: Any) -> int:
    """As many as the longest dimension has room for."""
    return x.numel() + TENSOR_ELEMENTS * max(x.shape, default=0)


def outer(a: Tensor, b: Tensor) -> int:
    return a.numel() * b.numel()


def matrix_product(a: Tensor, b: Tensor) -> int:
    batch: int = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    rows = a.shape[-2] if a.ndim > 1 else 1
    columns = b.shape[-1] if b.ndim > 1 else 1
    return batch * rows * columns * max(1, a.shape[-1] // _PRODUCTS_OF_AN_ELEMENT)


def selected(x: Tensor, dim: int, index: Tensor) -> int:
    return x.numel() // max(x.shape[dim], 1) * index.numel() if x.ndim else index.numel()


def indexed(x: Any, index: Any) -> int:
    """``x[index]``: by masks not more than x has; by integers, their number for each of the other elements."""
    items = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Tensor):
        if not isinstance(x, tuple | list) or not isinstance(index, int | slice):
            raise TypeError("only tensors and tuples are indexed, tuples by integers and slices")
        return 0
    num_indexed = sum(_num_dims(item) for item in items)
    dim, others, by_integers = 0, x.numel(), []
    for item in items:
        if isinstance(item, Tensor) and item.dtype != torch.bool and dim < x.ndim:
            others //= max(x.shape[dim], 1)
            by_integers.append(item.shape)
        dim += x.ndim - num_indexed if item is Ellipsis else _num_dims(item)
    return others * math.prod(torch.broadcast_shapes(*by_integers)) if by_integers else x.numel()


def _num_dims(item: object) -> int:
    """How many dimensions of a tensor an index takes."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor):
        return item.ndim if item.dtype == torch.bool else 1
    if isinstance(item, slice):
        if all(part is None or type(part) is int for part in (item.start, item.stop, item.step)):
            return 1
    elif type(item) is int:
        return 1
    raise TypeError("an index must be an integer, a slice of integers, None, ..., or a tensor")


def numbers(*args: Any) -> int:
    if not all(is_number(value) for value in args):
        raise TypeError("takes numbers, not tensors")
    return 0


def arithmetic(*args: Any) -> int:
    if not all(isinstance(value, Tensor) or is_number(value) for value in args):
        raise TypeError("takes tensors and numbers")
    return broadcast(*args)
