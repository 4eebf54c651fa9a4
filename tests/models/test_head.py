"""Log-probabilities and their gradients against the definition, and what makes them exact in bf16."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU, random_adapter_state
from tests.models.tiny import VOCAB_SIZE, make_tiny_model
from tuft.models.decoder import Decoder, Precision
from tuft.models.head import MAX_CHUNK_ROWS, Targets, exact_logits, score
from tuft.models.load import load_weights
from tuft.models.lora import Adapter, Segment
from tuft.types import LoraSpec


@cache
def decoder(precision: Precision) -> Decoder:
    with TemporaryDirectory() as directory:
        return Decoder(load_weights(str(make_tiny_model("llama", Path(directory)))), precision, CPU)


def adapter_of(precision: Precision, seed: int) -> Adapter:
    config = decoder(precision).config
    state = random_adapter_state(config, LoraSpec(rank=3, seed=seed), seed=seed, size=0.2)
    return Adapter.from_state(config.linear_shapes(), state, CPU, trainable=True)


def definition(precision: Precision, x_TD: Tensor, segments: list[Segment]) -> Tensor:
    """Logits in float64 from the head's own weights."""
    logits_TV = x_TD.double() @ decoder(precision).head_VD.double().t()
    for segment in segments:
        group = segment.adapter.views(torch.float32)["lm_head"]
        rows = slice(segment.start, segment.stop)
        product = x_TD[rows].double() @ group.A_RK.double().t() @ group.Bs_Nr[0].double().t()
        logits_TV[rows] += segment.adapter.spec.scale * product
    return logits_TV


def hidden(num_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def every_row_once(num_rows: int) -> Targets:
    rng = np.random.default_rng(0)
    return Targets(np.arange(num_rows), rng.integers(0, VOCAB_SIZE, num_rows))


def test_logprobs_and_gradients_are_those_of_the_definition() -> None:
    """Two adapters and rows of the base model between them, several targets a row, chunks cut within segments."""
    num_rows = 2 * MAX_CHUNK_ROWS["cpu"] + 50
    x_TD = hidden(num_rows, torch.float32)
    rng = np.random.default_rng(1)
    rows_M = np.sort(rng.integers(0, num_rows, 3 * num_rows))
    targets = Targets(rows_M, rng.integers(0, VOCAB_SIZE, len(rows_M)))
    g_M = torch.from_numpy((rng.normal(size=len(rows_M)) * (rng.random(len(rows_M)) > 0.5)).astype(np.float32))
    adapters = [adapter_of("float32", seed) for seed in (1, 2)]
    gradients = [adapter.layout.views(torch.zeros_like(adapter.params_P)) for adapter in adapters]
    segments = [
        Segment(adapter, start, stop, views)
        for adapter, start, stop, views in zip(adapters, (0, 170), (160, num_rows), gradients, strict=True)
    ]

    scores = score(decoder("float32"), x_TD, segments, targets, lambda first, stop, _: g_M[first:stop])

    leaf = x_TD.double().requires_grad_()
    logprobs = definition("float32", leaf, segments).log_softmax(-1)[targets.rows_M, targets.tokens_M]
    (expected_dx,) = torch.autograd.grad(logprobs, leaf, g_M.double())
    assert scores.dhidden_TD is not None
    torch.testing.assert_close(scores.logprobs_M.double(), logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.dhidden_TD.double(), expected_dx, rtol=1e-4, atol=1e-4)
    assert all(views["lm_head"].A_RK.any() for views in gradients)


def test_rows_without_a_gradient_get_none() -> None:
    x_TD = hidden(40, torch.float32)
    g_M = torch.zeros(40)
    g_M[7] = -1.0
    scores = score(decoder("float32"), x_TD, [], every_row_once(40), lambda first, stop, _: g_M[first:stop])
    assert scores.dhidden_TD is not None
    assert scores.dhidden_TD.any(dim=1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_likeliest_tokens_come_best_first(precision: Precision) -> None:
    x_TD = hidden(150, decoder(precision).dtype)
    scores = score(decoder(precision), x_TD, [], every_row_once(150), num_top=4)
    expected = definition(precision, x_TD, []).log_softmax(-1).topk(4, dim=-1)
    assert scores.top_tokens_TK is not None
    assert scores.top_logprobs_TK is not None
    torch.testing.assert_close(scores.top_logprobs_TK.double(), expected.values, rtol=0, atol=2e-2)
    if precision == "float32":
        assert torch.equal(scores.top_tokens_TK, expected.indices)


def test_in_bf16_the_targets_and_the_largest_logit_are_exact() -> None:
    adapter = adapter_of("bf16", 1)
    x_TD = 8 * hidden(60, torch.bfloat16)
    segments = [Segment(adapter, 0, 30)]
    expected = definition("bf16", x_TD, segments)
    rows_M, tokens_M = torch.arange(60), torch.arange(60) + 3
    logits = exact_logits(decoder("bf16"), x_TD, segments, rows_M, tokens_M).double()

    largest = logits.argmax(dim=-1)
    torch.testing.assert_close(logits[rows_M, tokens_M], expected[rows_M, tokens_M], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits[rows_M, largest], expected[rows_M, largest], rtol=1e-5, atol=1e-4)
    assert (logits - expected).abs().max() > 1e-2  # the others are not
    scores = score(decoder("bf16"), x_TD, segments, Targets(rows_M.numpy(), expected.argmax(dim=-1).numpy()))
    assert (scores.logprobs_M <= 0).all()
    torch.testing.assert_close(scores.logprobs_M.double(), expected.log_softmax(-1).amax(-1), rtol=0, atol=0.1)
