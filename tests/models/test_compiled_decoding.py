"""The kernels for decoded rows against torch's operators: low-rank products and draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU
from tuft.engine.sampling import Draw, draw_tokens
from tuft.models.compiled_decoding import CompiledDecode
from tuft.models.decoding import Draws, PackedAdapters
from tuft.models.lora import LM_HEAD, Adapter, Segment
from tuft.models.lora_linear import add_lora
from tuft.models.segments import lora_rows
from tuft.types import LoraSpec

KERNELS = CompiledDecode()
WIDTH, VOCAB_SIZE = 70, 1000  # neither a multiple of a vector
SHAPES = {
    "model.layers.0.self_attn.q_proj": (96, WIDTH),
    "model.layers.0.self_attn.k_proj": (24, WIDTH),
    "model.layers.0.self_attn.v_proj": (24, WIDTH),
    "model.layers.0.self_attn.o_proj": (WIDTH, 96),
    "model.layers.0.mlp.gate_proj": (40, WIDTH),
    "model.layers.0.mlp.up_proj": (40, WIDTH),
    "model.layers.0.mlp.down_proj": (WIDTH, 40),
    "lm_head": (VOCAB_SIZE, WIDTH),
}
SPECS = (
    LoraSpec(rank=1),
    LoraSpec(rank=8),
    LoraSpec(rank=5, train_attn=False),
    LoraSpec(rank=16, train_unembed=False),
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_adapter(spec: LoraSpec, seed: int) -> Adapter:
    adapter = Adapter(SHAPES, spec, CPU, trainable=False)
    adapter.params_P.copy_(0.1 * random(len(adapter.params_P), seed=seed))
    return adapter


ADAPTERS = [None, *(make_adapter(spec, seed) for seed, spec in enumerate(SPECS))]


def sizes(key: str) -> tuple[int, int]:
    """in_features, and out_features of the group together."""
    shape = PackedAdapters(SHAPES, torch.float32).shapes[key]
    return shape.in_features, int(shape.out_features.sum())


def with_lora(adapters: list[Adapter | None], y: Tensor, x: Tensor, key: str) -> Tensor:
    out = y.clone()
    KERNELS.add_lora(out, x, PackedAdapters(SHAPES, x.dtype).tables(adapters), key)
    return out


@each_dtype
@pytest.mark.parametrize("key", ["0.qkv", "0.o", "0.gate_up", "0.down", LM_HEAD])
def test_every_row_gets_the_product_of_its_own_adapter(key: str, dtype: torch.dtype) -> None:
    in_features, out_features = sizes(key)
    x, y = random(7, in_features).to(dtype), random(7, out_features, seed=1).to(dtype)
    adapters = [ADAPTERS[index] for index in (1, 0, 2, 2, 3, 4, 1)]
    expected = y.clone()
    segments = [Segment(adapter, row, row + 1) for row, adapter in enumerate(adapters) if adapter is not None]
    add_lora(expected, x, lora_rows(segments, key, dtype))
    out = with_lora(adapters, y, x, key)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert torch.equal(out[1], y[1])  # it has none


@each_dtype
def test_a_rows_product_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    in_features, out_features = sizes("0.qkv")
    x, y = random(12, in_features).to(dtype), random(12, out_features, seed=1).to(dtype)
    adapters = [ADAPTERS[row % 5] for row in range(12)]
    together = with_lora(adapters, y, x, "0.qkv")
    for rows in ([0], [4], [1, 6], [11, 3, 2, 8, 9]):
        assert torch.equal(with_lora([adapters[row] for row in rows], y[rows], x[rows], "0.qkv"), together[rows])


def test_the_last_tables_are_kept_until_forgotten() -> None:
    packed = PackedAdapters(SHAPES, torch.bfloat16)
    first = packed.tables(ADAPTERS)
    assert packed.tables(list(ADAPTERS)) is first
    assert packed.tables(ADAPTERS[::-1]) is not first
    packed.forget_tables()
    assert packed.tables(ADAPTERS[::-1]).adapters == ADAPTERS[::-1]


# --- draws ------------------------------------------------------------------------------------------------------------


def drawn(
    logits: Tensor, x: Tensor, head: Tensor, draws: list[Draw], rows: list[int], adapters: list[Adapter | None]
) -> tuple[list[int], list[float]]:
    wanted = Draws(
        torch.tensor(rows),
        torch.tensor([one.temperature for one in draws], dtype=torch.float32),
        torch.tensor([one.uniform for one in draws], dtype=torch.float64),
        torch.tensor([one.top_k for one in draws]),
        torch.tensor([one.top_p for one in draws], dtype=torch.float64),
    )
    lora = PackedAdapters(SHAPES, x.dtype).tables(adapters)
    tokens, logprobs = KERNELS.draw(logits, x, head, wanted, lora)
    return tokens.tolist(), logprobs.tolist()


def some_draws(count: int) -> list[Draw]:
    uniforms = np.random.default_rng(3).random(count)
    return [Draw((0.0, 1.0, 0.7, 1.6)[n % 4], -1, 1.0, float(uniforms[n])) for n in range(count)]


def test_float32_draws_are_those_of_torch() -> None:
    x, head = random(16, WIDTH), random(VOCAB_SIZE, WIDTH, seed=1)
    logits, draws = x @ head.T / 4, some_draws(16)
    tokens, logprobs = drawn(logits, x, head, draws, list(range(16)), [None] * 16)
    expected_tokens, expected_logprobs = draw_tokens(logits, draws)
    assert tokens == expected_tokens
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (-1, 0.05), (-1, 0.9), (40, 0.5), (2000, 0.999), (3, 0.01), (-1, 1e-9)]
)
@pytest.mark.parametrize("are_rounded", [False, True])
def test_truncated_draws_are_those_of_torch(are_rounded: bool, top_k: int, top_p: float) -> None:
    """Rounded logits have many equals, of which the first in the vocabulary are kept."""
    x, head = random(48, WIDTH), random(VOCAB_SIZE, WIDTH, seed=1)
    logits = x @ head.T / 4
    if are_rounded:
        logits = (logits * 4).round() / 4
    draws = [replace(one, top_k=top_k, top_p=top_p) for one in some_draws(48)]
    tokens, logprobs = drawn(logits, x, head, draws, list(range(48)), [None] * 48)
    expected_tokens, expected_logprobs = draw_tokens(logits, draws)
    assert tokens == expected_tokens
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-6)


def test_logits_rounded_to_bf16_give_exact_logprobs() -> None:
    """The two logits that matter are computed again in float32, with the adapter's share."""
    x, head = random(8, WIDTH).bfloat16(), (random(VOCAB_SIZE, WIDTH, seed=1) / 2).bfloat16()
    adapters = [ADAPTERS[row % 3] for row in range(8)]
    exact = x.float() @ head.float().T
    segments = [Segment(adapter, row, row + 1) for row, adapter in enumerate(adapters) if adapter is not None]
    add_lora(exact, x.float(), lora_rows(segments, LM_HEAD, torch.float32))
    draws = some_draws(8)
    tokens, logprobs = drawn(exact.bfloat16(), x, head, draws, list(range(8)), adapters)
    for row, (token, logprob, one) in enumerate(zip(tokens, logprobs, draws, strict=True)):
        logits = exact[row].bfloat16().float()
        for replaced in (int(logits.argmax()), token):
            logits[replaced] = exact[row, replaced]
        scaled = torch.log_softmax(logits.double() / (one.temperature or 1.0), -1)
        assert logprob == pytest.approx(float(scaled[token]), abs=2e-5)
        if one.temperature == 0:
            assert token == int(logits.argmax())


def test_several_draws_may_be_from_one_row() -> None:
    x, head = random(2, WIDTH), random(VOCAB_SIZE, WIDTH, seed=1)
    logits, draws, rows = x @ head.T / 4, some_draws(6), [0, 1, 1, 1, 0, 1]
    together = drawn(logits, x, head, draws, rows, [None] * 6)
    for n, row in enumerate(rows):
        (token,), (logprob,) = drawn(logits[row : row + 1], x[row : row + 1], head, [draws[n]], [0], [None])
        assert (token, logprob) == (together[0][n], together[1][n])


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, [7, 950]] = 0.0
    x, head = random(1, WIDTH), random(VOCAB_SIZE, WIDTH, seed=1)
    seen = {
        drawn(logits, x, head, [Draw(1.0, -1, 1.0, float(u))], [0], [None])[0][0]
        for u in (0.0, 0.25, 0.4999, 0.5, 0.75, np.nextafter(1.0, 0.0))
    }
    assert seen == {7, 950}


@each_dtype
def test_a_broken_row_gets_a_nan_and_leaves_the_others_alone(dtype: torch.dtype) -> None:
    x, head = random(4, WIDTH).to(dtype), random(VOCAB_SIZE, WIDTH, seed=1).to(dtype)
    logits, draws = (x @ head.T).to(dtype), some_draws(4)
    tokens, logprobs = drawn(logits, x, head, draws, [0, 1, 2, 3], [None] * 4)
    for row, value in ((0, torch.nan), (1, torch.nan), (2, torch.inf), (3, torch.nan)):
        broken = logits.clone()
        broken[row, 17] = value
        other_tokens, other_logprobs = drawn(broken, x, head, draws, [0, 1, 2, 3], [None] * 4)
        assert not np.isfinite(other_logprobs[row])
        assert 0 <= other_tokens[row] < VOCAB_SIZE
        for other in {0, 1, 2, 3} - {row}:
            assert (other_tokens[other], other_logprobs[other]) == (tokens[other], logprobs[other])
