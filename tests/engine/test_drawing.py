"""Draws of one step, each as if it were the only one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU, random_adapter_state
from tests.models.operators import each_ops, every_ops
from tests.models.tiny import make_tiny_model
from tuft.engine.drawing import Drawn, draw, segments_of
from tuft.engine.sampling import Draw
from tuft.models.decoder import Decoder, Precision
from tuft.models.decoding import PackedAdapters
from tuft.models.load import LoadedWeights, load_weights
from tuft.models.lora import LM_HEAD, Adapter
from tuft.models.ops import Ops
from tuft.types import LoraSpec


@cache
def tiny_weights(directory: str) -> LoadedWeights:
    return load_weights(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3")))


each_precision = pytest.mark.parametrize("precision", ["float32", "bf16"])
RULES = [(1.0, -1, 1.0), (0.7, 20, 1.0), (0.0, -1, 1.0), (1.0, -1, 0.8), (1.3, -1, 1.0)]


class Drawing:
    """Draws from rows of random hidden states, some of which have an adapter."""

    def __init__(self, directory: str, precision: Precision, ops: Ops) -> None:
        self.decoder = Decoder(tiny_weights(directory), precision, CPU, ops)
        shapes = self.decoder.config.linear_shapes()
        states = [random_adapter_state(self.decoder.config, LoraSpec(rank=4, seed=1), seed) for seed in range(2)]
        mine, theirs = (Adapter.from_state(shapes, state, CPU, trainable=False) for state in states)
        self.adapters = [mine, None, theirs, theirs]
        x_UD = torch.randn(4, self.decoder.config.hidden_size, generator=torch.Generator().manual_seed(3))
        self.x_UD: Tensor = x_UD.to(self.decoder.dtype)
        self._packed = PackedAdapters(shapes, self.decoder.dtype)

    def draw(self, rows: Sequence[int], origins: Sequence[int], draws: Sequence[Draw]) -> Drawn:
        adapters = [self.adapters[row] for row in rows]
        return draw(self.decoder, self._packed, self.x_UD[list(rows)], adapters, origins, draws)

    def logits(self) -> Tensor:
        """``[U, V]`` in float64."""
        logits_UV = self.x_UD.double() @ self.decoder.head_VD.double().T
        for row, adapter in enumerate(self.adapters):
            if adapter is not None:
                group = adapter.views(torch.float32)[LM_HEAD]
                h_r = group.A_RK.double() @ self.x_UD[row].double() * adapter.spec.scale
                logits_UV[row] += group.Bs_Nr[0].double() @ h_r
        return logits_UV


@each_ops
@each_precision
def test_a_draw_does_not_depend_on_the_others(precision: Precision, ops: Ops, directory: str) -> None:
    drawing, origins = Drawing(directory, precision, ops), [0, 1, 2, 3, 3, 3, 0]
    draws = [Draw(*RULES[n % 5], 0.04 + 0.13 * n, num_likeliest=n) for n in range(7)]
    together = drawing.draw(range(4), origins, draws)
    assert set(together.likeliest) == set(range(1, 7))
    for n, row in enumerate(origins):
        alone = drawing.draw([row], [0], [draws[n]])
        assert (alone.tokens, alone.logprobs) == ([together.tokens[n]], [together.logprobs[n]])
        if n:
            np.testing.assert_array_equal(alone.likeliest[0].ids_LK, together.likeliest[n].ids_LK)
            np.testing.assert_array_equal(alone.likeliest[0].logprobs_LK, together.likeliest[n].logprobs_LK)


@every_ops
@each_precision
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_the_likeliest_tokens_are_told_with_the_logprobs_of_the_draw(
    temperature: float, precision: Precision, ops: Ops, directory: str
) -> None:
    drawing, origins = Drawing(directory, precision, ops), [0, 1, 2, 3, 3]
    drawn = drawing.draw(range(4), origins, [Draw(temperature, 3, 0.9, 0.05 + 0.2 * n, 12) for n in range(5)])
    scaled_UV = drawing.logits() / (temperature or 1.0)
    for n, row in enumerate(origins):
        ids_K, logprobs_K = drawn.likeliest[n].ids_LK[0], drawn.likeliest[n].logprobs_LK[0]
        assert len(set(ids_K.tolist())) == 12
        assert (np.diff(logprobs_K) <= 0).all()
        # top-k is 3: the token drawn is among the likeliest, and has one logprob
        np.testing.assert_array_equal(logprobs_K[ids_K == drawn.tokens[n]], np.float32(drawn.logprobs[n]))
        # whatever is rounded in the sum over the vocabulary, it is the same for all of them: their ratios are exact
        expected_K = scaled_UV[row, ids_K].numpy() - float(scaled_UV[row, drawn.tokens[n]]) + drawn.logprobs[n]
        np.testing.assert_allclose(logprobs_K, expected_K, atol=5e-5)
        if precision == "float32":
            expected = torch.log_softmax(scaled_UV[row], -1).topk(12)
            assert ids_K.tolist() == expected.indices.tolist()
            np.testing.assert_allclose(logprobs_K, expected.values.numpy(), atol=1e-5)


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
