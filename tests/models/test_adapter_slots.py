"""Adapters in slots: every row has its adapter's product, whatever was in the slots before."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU
from tests.models.test_lora_linear import KEYS, inputs_of, linear_shapes, new_adapter, relative
from tuft.models.adapter_slots import AdapterSlots, SlotRows
from tuft.models.lora import Adapter, Segment
from tuft.models.lora_linear import LoraProducts

SHAPES = linear_shapes(64, 32, 96)
F32 = torch.float32


def added(slots: AdapterSlots, adapters: list[Adapter | None], key: str) -> tuple[Tensor, Tensor]:
    """What slots add for rows of ``adapters``, which are in order of slot, and what each adapter alone adds."""
    x_BK, y_BN, _ = inputs_of(SHAPES, key, len(adapters), F32)
    places = slots.place(adapters)
    assert places == sorted(places)
    counts = torch.tensor([places.count(slot) for slot in range(slots.num_slots)])
    scales_B1 = torch.tensor([[1.0 if adapter is None else adapter.spec.scale] for adapter in adapters])
    actual = y_BN.clone()
    SlotRows(slots, counts.cumsum(0).to(torch.int32), scales_B1).add(actual, x_BK, key)
    expected = y_BN.clone()
    segments = [Segment(adapter, row, row + 1) for row, adapter in enumerate(adapters) if adapter is not None]
    LoraProducts(segments, F32, None).add(expected, x_BK, key)
    return actual, expected


@pytest.mark.parametrize("key", KEYS)
def test_every_row_has_the_product_of_its_adapter(key: str) -> None:
    slots = AdapterSlots(SHAPES, F32, CPU)
    adapters = [new_adapter(SHAPES, rank, rank, train_mlp=rank != 5) for rank in (4, 5, 12)]
    slots.place(adapters)
    rows = [None, *sorted([adapters[0], *adapters], key=lambda adapter: slots.place([adapter]))]
    actual, expected = added(slots, rows, key)
    assert relative(actual, expected.double()) < 1e-5
    assert torch.equal(actual[0], expected[0])


def test_a_slot_that_is_used_again_keeps_nothing_of_its_last_adapter() -> None:
    slots = AdapterSlots(SHAPES, F32, CPU)
    slots.place([new_adapter(SHAPES, 12, 1)])
    generation = slots.generation
    actual, expected = added(slots, [new_adapter(SHAPES, 3, 2, train_mlp=False)], "0.qkv")
    assert slots.generation == generation
    assert relative(actual, expected.double()) < 1e-5
    x_BK, y_BN, _ = inputs_of(SHAPES, "0.down", 1, F32)
    SlotRows(slots, torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, 1)).add(y_BN, x_BK, "0.down")
    assert torch.equal(y_BN, inputs_of(SHAPES, "0.down", 1, F32)[1])


def test_adapters_stay_where_they_are_while_others_come_and_go() -> None:
    slots = AdapterSlots(SHAPES, F32, CPU)
    first, second, third = (new_adapter(SHAPES, 8, seed) for seed in range(3))
    places = slots.place([first, second, None])
    assert places[2] == 0
    assert 0 not in places[:2]
    assert slots.place([second]) == places[1:2]
    assert slots.place([second, third])[0] == places[1]
    assert slots.place([None, None]) == [0, 0]


def test_more_adapters_or_a_higher_rank_lay_the_slots_anew() -> None:
    slots = AdapterSlots(SHAPES, F32, CPU)
    assert slots.num_slots == 0
    slots.place([None])
    assert slots.generation == 0
    slots.place([new_adapter(SHAPES, 8, 0)])
    before = slots.generation, slots.num_slots
    slots.place([new_adapter(SHAPES, 8, seed) for seed in range(5)])
    assert slots.generation > before[0]
    assert slots.num_slots > before[1]
    before = slots.generation, slots.num_slots
    slots.place([new_adapter(SHAPES, 9, 0)])
    assert slots.generation > before[0]
    matrices = slots.matrices("0.o")
    assert matrices is not None
    assert matrices.A_SRK.shape[1] == 16


def test_an_adapter_that_is_gone_leaves_its_slot() -> None:
    slots = AdapterSlots(SHAPES, F32, CPU)
    for seed in range(4):
        slots.place([new_adapter(SHAPES, 8, seed)])
        gc.collect()
    assert slots.num_slots == 2
