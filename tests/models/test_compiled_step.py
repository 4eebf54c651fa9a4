"""A whole step of decoding in one call: against the operators it replaces, and rows against themselves alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor

from tests.engine.reference import CPU, random_adapter_state
from tests.models.operators import COMPILED, EAGER
from tests.models.tiny import VOCAB_SIZE, TinyKind, make_tiny_model
from tuft.models.decoder import Decoder
from tuft.models.decoding import DecodeStep, LoraTables, PackedAdapters
from tuft.models.load import load_weights
from tuft.models.lora import Adapter, Segment
from tuft.models.ops import Ops
from tuft.models.paged_attention import PAGE_TOKENS, PageTables, paged_attention
from tuft.types import LoraSpec

BF16 = torch.bfloat16
LENGTHS = [1, 16, 17, 40, 3, 70, 33, 2, 5, 64, 9, 18, 31]
KINDS: list[TinyKind] = ["llama", "qwen2", "qwen3"]  # without more, with biases, with norms of the heads
SPECS = [LoraSpec(rank=8), LoraSpec(rank=3, train_mlp=False), LoraSpec(rank=12, train_attn=False)]


@cache
def decoder_of(kind: TinyKind, ops: Ops = COMPILED) -> Decoder:
    decoder = Decoder(load_weights(str(make_tiny_model(kind, Path(mkdtemp()) / kind))), "bf16", CPU, ops)
    decoder.pack()
    return decoder


def step_of(kind: TinyKind) -> DecodeStep:
    step = decoder_of(kind).step
    assert step is not None
    return step


def adapters_of(kind: TinyKind) -> list[Adapter | None]:
    """One a row of ``LENGTHS``."""
    config = decoder_of(kind).config
    states = [random_adapter_state(config, spec, seed) for seed, spec in enumerate(SPECS)]
    made = [Adapter.from_state(config.linear_shapes(), state, CPU, trainable=False) for state in states]
    return [None if row % 4 == 3 else made[row % 3] for row in range(len(LENGTHS))]


def lora_of(kind: TinyKind, adapters: list[Adapter | None]) -> LoraTables:
    return PackedAdapters(decoder_of(kind).config.linear_shapes(), BF16).tables(adapters)


def page_tables(kind: TinyKind, rows: list[int]) -> PageTables:
    """Of these rows of ``LENGTHS``; what is known of a sequence does not depend on who else is there."""
    config = decoder_of(kind).config
    width = -(-max(LENGTHS) // PAGE_TOKENS)
    size = (config.num_layers, 2, config.num_kv_heads, PAGE_TOKENS * config.head_dim)
    pages = []
    for row in rows:
        generator = torch.Generator().manual_seed(row)
        pages.append(torch.randn(width, *size, generator=generator).to(BF16))
    lengths = [LENGTHS[row] for row in rows]
    table_BW = torch.arange(len(rows) * width).view(len(rows), width)
    return PageTables(torch.cat(pages), table_BW, lengths, torch.tensor(lengths))


def tokens_of(rows: list[int]) -> list[int]:
    return [(37 * row + 5) % VOCAB_SIZE for row in rows]


class _Paged:
    """``decoder.Attention`` by torch's operators."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables

    def attend(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        return paged_attention(layer, q_THd, k_TGd, v_TGd, self._tables)


ROWS = list(range(len(LENGTHS)))


@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_what_the_operators_do(kind: TinyKind, with_adapters: bool) -> None:
    adapters = adapters_of(kind) if with_adapters else []
    tables, expected_tables = page_tables(kind, ROWS), page_tables(kind, ROWS)
    actual = step_of(kind).hidden(tokens_of(ROWS), tables, lora_of(kind, adapters) if adapters else None)
    segments = [Segment(adapter, row, row + 1) for row, adapter in enumerate(adapters) if adapter is not None]
    with torch.no_grad():
        expected = decoder_of(kind, EAGER).hidden(
            torch.tensor(tokens_of(ROWS)), expected_tables.lengths_B - 1, _Paged(expected_tables), segments
        )
    distance = (actual.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    assert distance.max() < 0.03
    written = (tables.pages.float() - expected_tables.pages.float()).abs()
    assert written.max() < 0.1
    before = page_tables(kind, ROWS).pages
    ours, theirs = tables.pages != before, expected_tables.pages != before
    assert (ours ^ theirs).sum() <= 0.02 * theirs.sum()  # a number may come out as it was


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_beside_any_others_and_on_any_number_of_threads(
    kind: TinyKind, num_threads: int
) -> None:
    adapters = adapters_of(kind)
    together = page_tables(kind, ROWS)
    fused = step_of(kind).hidden(tokens_of(ROWS), together, lora_of(kind, adapters))
    num_usual = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for some in ([0], [3], [4, 5], [7, 2, 9], [1, 2, 3, 4, 5], ROWS[::-1][:9]):
            tables = page_tables(kind, some)
            alone = step_of(kind).hidden(tokens_of(some), tables, lora_of(kind, [adapters[row] for row in some]))
            assert torch.equal(alone, fused[some]), some
            width = together.table_BW.shape[1]
            for place, row in enumerate(some):
                own = slice(place * width, (place + 1) * width)
                assert torch.equal(tables.pages[own], together.pages[row * width : (row + 1) * width]), row
    finally:
        torch.set_num_threads(num_usual)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    adapters = adapters_of("llama")
    expected = step_of("llama").hidden(tokens_of(ROWS), page_tables("llama", ROWS), lora_of("llama", adapters))
    tables = page_tables("llama", ROWS)
    tables.pages[tables.table_BW[2, 0]] = torch.nan
    actual = step_of("llama").hidden(tokens_of(ROWS), tables, lora_of("llama", adapters))
    assert actual[2].isnan().all()
    others = [row for row in ROWS if row != 2]
    assert torch.equal(actual[others], expected[others])


def test_sizes_that_do_not_fill_vectors_are_left_to_the_operators() -> None:
    assert decoder_of("llama-tied").config.head_dim == 8
    assert decoder_of("llama-tied").step is None
    assert decoder_of("llama", EAGER).step is None
    config = load_weights(str(make_tiny_model("llama", Path(mkdtemp()))))
    float32 = Decoder(config, "float32", CPU, COMPILED)
    float32.pack()
    assert float32.step is None


def test_weights_are_packed_anew_when_operators_are_replaced() -> None:
    weights = load_weights(str(make_tiny_model("llama", Path(mkdtemp()))))
    decoder = Decoder(weights, "bf16", CPU, EAGER)
    decoder.pack()
    assert decoder.step is None
    decoder.ops = COMPILED
    decoder.pack()
    step = decoder.step
    assert step is not None
    decoder.pack()
    assert decoder.step is step
