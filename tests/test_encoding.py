from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from tuft.encoding import Encoding
from tuft.engine.base import OptimStep, RunLoss
from tuft.errors import StorageError
from tuft.types import AdamParams, Datum, LossResult, Matrix

ENCODING = Encoding([RunLoss, OptimStep, AdamParams, Datum, LossResult, Matrix])


def loss(seed: int = 0) -> RunLoss:
    random = np.random.default_rng(seed)
    data = tuple(
        Datum(
            random.integers(0, 100, length),
            {"target_tokens": random.integers(0, 100, length), "weights": random.random(length).astype(np.float32)},
        )
        for length in (1, 7, 300, 2)
    )
    return RunLoss("run", data, "ppo", (("clip_low_threshold", 0.8), ("name", "x")))


def assert_equal(one: RunLoss, other: RunLoss) -> None:
    assert (one.adapter_id, one.loss_fn, one.loss_fn_config) == (other.adapter_id, other.loss_fn, other.loss_fn_config)
    for left, right in zip(one.data, other.data, strict=True):
        np.testing.assert_array_equal(left.tokens_T, right.tokens_T)
        assert left.loss_fn_inputs.keys() == right.loss_fn_inputs.keys()
        for name, array in left.loss_fn_inputs.items():
            assert array.dtype == right.loss_fn_inputs[name].dtype
            np.testing.assert_array_equal(array, right.loss_fn_inputs[name])


def test_an_operation_comes_back_as_it_was() -> None:
    assert_equal(ENCODING.decode(ENCODING.encode(loss())), loss())


def test_equal_records_give_equal_bytes_and_others_do_not() -> None:
    assert ENCODING.encode(loss()) == ENCODING.encode(loss())
    assert ENCODING.encode(loss()) != ENCODING.encode(loss(1))


def test_floats_come_back_to_the_bit() -> None:
    params = AdamParams(learning_rate=0.1 + 0.2, eps=5e-324, weight_decay=math.inf)
    assert ENCODING.decode(ENCODING.encode(OptimStep("run", params))) == OptimStep("run", params)
    result = ENCODING.decode(ENCODING.encode(LossResult((), {"loss:sum": math.nan})))
    assert math.isnan(result.metrics["loss:sum"])


def test_empty_and_shaped_arrays_come_back() -> None:
    matrix = Matrix(np.zeros(0, np.float32), (3, 0))
    assert ENCODING.decode(ENCODING.encode(matrix)).values_M.shape == (0,)
    result = LossResult((np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)), {})
    assert [array.shape for array in ENCODING.decode(ENCODING.encode(result)).logprobs] == [(2, 3), (0, 3)]


@pytest.mark.parametrize("at", [0, 5, 9, 40, -1])
def test_a_flipped_bit_is_found(at: int) -> None:
    content = bytearray(ENCODING.encode(loss()))
    content[at] ^= 1
    with pytest.raises(StorageError, match="damaged"):
        ENCODING.decode(bytes(content))


@pytest.mark.parametrize("length", [0, 3, 11, 100, -1])
def test_a_truncated_record_is_found(length: int) -> None:
    with pytest.raises(StorageError, match="damaged"):
        ENCODING.decode(ENCODING.encode(loss())[:length])


def test_a_class_that_is_not_listed_is_not_written() -> None:
    @dataclass(frozen=True)
    class Other:
        value: int = 0

    with pytest.raises(TypeError, match="Other is not journaled"):
        ENCODING.encode(Other())


def test_a_field_that_an_older_class_did_not_have_gets_its_default() -> None:
    @dataclass(frozen=True)
    class Record:
        value: int

    content = Encoding([Record]).encode(Record(3))

    @dataclass(frozen=True)
    class Newer:
        value: int
        more: tuple[str, ...] = field(default=("all",))

    Newer.__name__ = "Record"
    assert Encoding([Newer]).decode(content) == Newer(3, ("all",))
