"""Attention of a step: chunks behind what was computed before them, beside tokens that are decoded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.test_kv_pages import CONFIG, make_pages
from tests.models.operators import COMPILED, EAGER, each_ops
from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.engine.step_attention import ChunkRows, StepAttention
from tuft.models.branches import Branch
from tuft.models.ops import Ops
from tuft.models.packed import TiledPackedAttention
from tuft.models.paged_attention import PageTables

LAYER = 1
Qkv = tuple[Tensor, Tensor, Tensor]


def make_qkv(num_rows: int, seed: int = 0) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    heads = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    q, k, v = (torch.randn(num_rows, count, CONFIG.head_dim, generator=generator) for count in heads)
    return q, k, v


def expected_context(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Causal attention of one whole sequence, in float64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


class Prompt:
    """A sequence whose rows are computed chunk by chunk."""

    def __init__(self, pages: KvPages, chunks: list[int], seed: int) -> None:
        self.bounds = [0, *torch.tensor(chunks).cumsum(0).tolist()]
        self.qkv = make_qkv(self.bounds[-1], seed)
        self.pages = pages.take(sum(num_pages_of(size) for size in chunks))

    def chunk(self, index: int) -> ChunkRows:
        start, stop = self.bounds[index : index + 2]
        return ChunkRows(start, stop - start, self.pages[: num_pages_of(stop)])

    def rows(self, index: int) -> Qkv:
        q, k, v = (x[self.bounds[index] : self.bounds[index + 1]] for x in self.qkv)
        return q, k, v

    def expected(self, index: int) -> Tensor:
        return expected_context(*self.qkv)[self.bounds[index] : self.bounds[index + 1]]


def contexts(pages: KvPages, wanted: list[tuple[Prompt, int]], ops: Ops = EAGER) -> list[Tensor]:
    """One step with these chunks; the context of each."""
    attention = StepAttention(pages, None, None, [prompt.chunk(index) for prompt, index in wanted], ops.attention)
    rows = [prompt.rows(index) for prompt, index in wanted]
    out = attention.attend(LAYER, *(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return list(out.split([len(q) for q, _, _ in rows]))


@pytest.mark.parametrize("chunks", [[1], [5], [128], [32, 1], [16, 32, 9], [128, 128, 40]])
@pytest.mark.parametrize("at_once", [True, False])
@each_ops
def test_a_prompt_in_chunks_equals_a_prompt_at_once(ops: Ops, chunks: list[int], at_once: bool) -> None:
    pages = make_pages(40)
    prompt = Prompt(pages, chunks, seed=1)
    every = [(prompt, index) for index in range(len(chunks))]
    steps = [every] if at_once else [[one] for one in every]
    out = [context for step in steps for context in contexts(pages, step, ops)]
    for index, context in enumerate(out):
        torch.testing.assert_close(context.double(), prompt.expected(index), atol=1e-5, rtol=0)


def test_by_kernels_chunks_have_the_bits_of_the_trainers_rows() -> None:
    pages = make_pages(40)
    prompt = Prompt(pages, [128, 128, 40], seed=1)
    out = torch.cat([contexts(pages, [(prompt, index)], COMPILED)[0] for index in range(3)])
    trained = TiledPackedAttention([Branch(0, 296)], COMPILED.attention).attend(LAYER, *prompt.qkv)
    assert torch.equal(out, trained)


@each_ops
def test_a_chunk_has_the_same_bits_beside_any_others(ops: Ops) -> None:
    def prompts() -> tuple[KvPages, list[Prompt]]:
        pages = make_pages(80)
        return pages, [
            Prompt(pages, chunks, seed)
            for seed, chunks in enumerate(([128, 64], [128, 64], [64], [64], [7], [128, 30]))
        ]

    pages, alone = prompts()
    expected = {
        (number, index): contexts(pages, [(prompt, index)], ops)[0]
        for number, prompt in enumerate(alone)
        for index in range(len(prompt.bounds) - 1)
    }
    pages, beside = prompts()
    for step in (
        [(0, 0), (4, 0), (1, 0), (2, 0)],
        [(1, 1), (5, 0), (5, 1), (0, 1), (3, 0)],
    ):
        out = contexts(pages, [(beside[number], index) for number, index in step], ops)
        for key, context in zip(step, out, strict=True):
            assert torch.equal(context, expected[key])


def test_tokens_that_are_decoded_come_before_chunks() -> None:
    pages = make_pages(20)
    decoded, prompt = Prompt(pages, [20, 1], seed=1), Prompt(pages, [30], seed=2)
    contexts(pages, [(decoded, 0)])
    tables = PageTables(pages.pages, torch.tensor([decoded.pages[:2]]), [21], torch.tensor([21]))
    attention = StepAttention(pages, tables, None, [prompt.chunk(0)])
    rows = (torch.cat(parts) for parts in zip(decoded.rows(1), prompt.rows(0), strict=True))
    out = attention.attend(LAYER, *rows)
    torch.testing.assert_close(out[:1].double(), decoded.expected(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1:].double(), prompt.expected(0), atol=1e-5, rtol=0)
