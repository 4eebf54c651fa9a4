"""What torch's CUDA kernels are asked: the calls as they would be made, without a GPU to make them.

That attention comes out right is told by ``test_block_attention``, on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.engine.reference import CPU
from tuft.models.branches import Branch
from tuft.models.flash_attention import (
    FlashPackedAttention,
    Sequences,
    _backward,
    _forward,
    flash_single_queries,
    flash_takes,
)

T, H, G, D = 32, 4, 2, 64


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_the_calls_to_cuda_kernels_have_the_shapes_that_they_take() -> None:
    with FakeTensorMode():
        q, k, v = on_gpu(T, H, D), on_gpu(T, G, D), on_gpu(T, G, D)
        bounds = on_gpu(3, dtype=torch.int32)
        sequences = Sequences(bounds, bounds, (0, 12, T), (0, 12, T), is_causal=True)
        out, lse = _forward(q, k, v, sequences)
        assert (out.shape, lse.shape, lse.dtype) == ((T, H, D), (H, T), torch.float32)
        dq, dk, dv = _backward(on_gpu(T, H, D), (q, k, v), out, lse, sequences)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


def test_single_queries_read_padded_keys_up_to_their_lengths() -> None:
    with FakeTensorMode():
        keys = on_gpu(5, 48, G, D)
        out = flash_single_queries(on_gpu(5, H, D), keys, keys, on_gpu(5, dtype=torch.int64))
        assert (out.shape, out.dtype) == ((5, H, D), torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "device", "takes"),
    [
        (torch.bfloat16, 64, "cuda", True),
        (torch.float32, 64, "cuda", False),
        (torch.bfloat16, 20, "cuda", False),
        (torch.float32, 64, "cpu", True),
    ],
)
def test_flash_kernels_take_what_they_can(dtype: torch.dtype, head_dim: int, device: str, takes: bool) -> None:
    assert flash_takes(dtype, head_dim, torch.device(device)) == takes


def test_branches_of_one_prefix_are_one_sequence_behind_it() -> None:
    branches = [
        Branch(0, 40),
        Branch(40, 50, ((0, 40),)),
        Branch(50, 55, ((0, 40),)),
        Branch(55, 60, ((0, 40), (40, 44))),
    ]
    prefixed = FlashPackedAttention(branches, CPU)._prefixed
    assert prefixed is not None
    assert prefixed.queries == (40, 60)
    assert prefixed.sequences.query_stops == (0, 15, 20)
    assert prefixed.sequences.key_stops == (0, 40, 84)
    assert not prefixed.sequences.is_causal
    assert FlashPackedAttention(branches[:1], CPU)._prefixed is None
