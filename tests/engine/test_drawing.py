"""Draws of one step, each as if it were the only one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU, random_adapter_state
from tests.models.operators import each_ops
from tests.models.tiny import make_tiny_model
from tuft.engine.drawing import draw, segments_of
from tuft.engine.sampling import Draw
from tuft.models.decoder import Decoder, Precision
from tuft.models.decoding import PackedAdapters
from tuft.models.load import LoadedWeights, load_weights
from tuft.models.lora import Adapter
from tuft.models.ops import Ops
from tuft.types import LoraSpec


@cache
def tiny_weights(directory: str) -> LoadedWeights:
    return load_weights(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3")))


@each_ops
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_draw_does_not_depend_on_the_others(precision: Precision, ops: Ops, directory: str) -> None:
    decoder = Decoder(tiny_weights(directory), precision, CPU, ops)
    shapes = decoder.config.linear_shapes()
    states = [random_adapter_state(decoder.config, LoraSpec(rank=4, seed=1), seed) for seed in range(2)]
    mine, theirs = (Adapter.from_state(shapes, state, CPU, trainable=False) for state in states)
    adapters = [mine, None, theirs, theirs]
    x_UD: Tensor = torch.randn(4, decoder.config.hidden_size).to(decoder.dtype)
    rules = [(1.0, -1, 1.0), (0.7, 20, 1.0), (0.0, -1, 1.0), (1.0, -1, 0.8), (1.3, -1, 1.0)]
    draws = [Draw(*rules[n % 5], 0.04 + 0.13 * n) for n in range(7)]
    origins = [0, 1, 2, 3, 3, 3, 0]
    packed = PackedAdapters(shapes, decoder.dtype)
    tokens, logprobs = draw(decoder, packed, x_UD, adapters, origins, draws)
    for n, row in enumerate(origins):
        alone = draw(decoder, packed, x_UD[row : row + 1], [adapters[row]], [0], [draws[n]])
        assert alone == ([tokens[n]], [logprobs[n]])


def test_neighbours_with_one_adapter_are_one_segment() -> None:
    first, second = (
        Adapter({"lm_head": (8, 4)}, LoraSpec(rank=1, train_attn=False, train_mlp=False), CPU) for _ in "ab"
    )
    found = segments_of([None, first, first, second, None, second])
    assert [(segment.adapter, segment.start, segment.stop) for segment in found] == [
        (first, 1, 3),
        (second, 3, 4),
        (second, 5, 6),
    ]
