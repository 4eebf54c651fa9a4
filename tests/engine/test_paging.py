"""Who leaves a GPU whose memory adapters do not fit, and that nothing is lost on the way. On a CPU both sides are
its own."""

from __future__ import annotations

import torch

from tests.engine.reference import CPU
from tests.models.test_lora_linear import linear_shapes, random
from tuft.engine.paging import Pager
from tuft.models.lora import Adapter
from tuft.types import LoraSpec

SHAPES = linear_shapes(64, 32, 96)
META = torch.device("meta")
"""A device that is not the host, for where things are."""


def new_adapter(trainable: bool = True) -> Adapter:
    return Adapter(SHAPES, LoraSpec(rank=8), CPU, trainable)


def test_those_used_longest_ago_leave_first() -> None:
    first, second, third = (new_adapter() for _ in range(3))
    pager = Pager(CPU, 2 * first.num_bytes)
    for adapter in (first, second, first, third):
        pager.fetch(adapter, ())
    assert pager.resident == (first, third)


def test_what_is_in_use_stays_although_there_is_no_room() -> None:
    adapters = [new_adapter() for _ in range(3)]
    pager = Pager(META, adapters[0].num_bytes)
    for number, adapter in enumerate(adapters):
        pager.fetch(adapter, adapters[: number + 1])
    assert all(adapter.params_P.device == META for adapter in adapters)
    assert pager.resident == tuple(adapters)


def test_room_is_made_for_as_many_as_are_needed() -> None:
    adapters = [new_adapter(trainable=False) for _ in range(8)]
    large = new_adapter()
    pager = Pager(CPU, 8 * adapters[0].num_bytes)
    for adapter in adapters:
        pager.fetch(adapter, ())
    assert len(pager.resident) == 8
    pager.fetch(large, ())
    assert large.num_bytes == 3 * adapters[0].num_bytes
    assert pager.resident == (*adapters[3:], large)
    pager.forget(large)
    assert pager.resident == tuple(adapters[3:])


def test_an_adapter_comes_back_with_the_bits_it_left_with() -> None:
    adapter = new_adapter()
    adapter.params_P.copy_(random(len(adapter.params_P), seed=1))
    adapter.moments["exp_avg"].copy_(random(len(adapter.params_P), seed=2))
    adapter.moments["exp_avg_sq"].copy_(random(len(adapter.params_P), seed=3))
    adapter.add_gradients(random(len(adapter.params_P), seed=4))
    before = adapter.state(with_optimizer=True)
    half = adapter.views(torch.bfloat16)["0.o"].A_RK.clone()
    adapter.move_to_host()
    adapter.move_to(CPU)
    after = adapter.state(with_optimizer=True)
    for kind in ("weights", "exp_avg", "exp_avg_sq", "gradients"):
        for name, array in getattr(before, kind).items():
            assert array.tobytes() == getattr(after, kind)[name].tobytes(), (kind, name)
    assert torch.equal(adapter.views(torch.bfloat16)["0.o"].A_RK, half)
    assert adapter.views(torch.float32)["0.o"].A_RK.data_ptr() != 0
