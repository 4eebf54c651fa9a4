"""What kernels are made of, through kernels made of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuft.models.kernels.native import (
    SERIAL_ELEMENTS,
    arguments,
    array,
    as_double,
    double_bits,
    exp,
    kernel,
    loaded,
    share,
    stored,
)


@kernel
def _exp(p: Any) -> None:
    a = arguments(p)
    x, out = array(a[1], a[0], np.float32), array(a[2], a[0], np.float32)
    first, stop = share(a[0])
    for i in range(first, stop):
        out[i] = exp(x[i])


@kernel
def _scaled(p: Any) -> None:
    a = arguments(p)
    x, out, factor = array(a[1], a[0], np.uint16), array(a[2], a[0], np.uint16), np.float32(as_double(a[3]))
    first, stop = share(a[0])
    for i in range(first, stop):
        out[i] = stored(loaded(x[i]) * factor, np.uint16)


def exps(x: Tensor) -> Tensor:
    out = torch.full_like(x, -1)
    _exp(len(x), len(x), x.data_ptr(), out.data_ptr())
    return out


def scaled(x: Tensor, factor: float) -> Tensor:
    out = torch.full_like(x, -1)
    _scaled(len(x), len(x), x.data_ptr(), out.data_ptr(), double_bits(factor))
    return out


def test_the_exponential_is_within_a_unit_in_the_last_place() -> None:
    x = torch.linspace(-87.3, 88.3, 400_001)
    exact = x.double().exp()
    assert ((exps(x).double() - exact) / exact).abs().max() < 2**-23


def test_the_exponential_of_extremes_is_zero_bounded_or_not_a_number() -> None:
    low, lowest, high, nan = exps(torch.tensor([-90.0, -math.inf, math.inf, math.nan])).tolist()
    assert low == lowest == 0
    assert 1e38 < high < math.inf
    assert math.isnan(nan)


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)  # every bf16 number there is; subnormal ones may become 0
    product = x.float() * 1.2345
    x, product = x[product.abs() >= 2**-126], product[product.abs() >= 2**-126]
    assert torch.equal(scaled(x, 1.2345), product.to(torch.bfloat16))


def test_what_is_no_number_stays_none_in_bf16() -> None:
    assert scaled(torch.full((40,), math.nan, dtype=torch.bfloat16), 2.0).isnan().all()


@pytest.mark.parametrize("size", [1, SERIAL_ELEMENTS - 1, SERIAL_ELEMENTS, SERIAL_ELEMENTS + 1])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_every_element_is_computed_however_the_work_is_shared(size: int, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(scaled(torch.ones(size, dtype=torch.bfloat16), 3.0).float(), torch.full((size,), 3.0))
    finally:
        torch.set_num_threads(before)
