"""The decoder's logits against transformers, and that packed sequences do not see each other."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.reference import CPU, random_adapter_state, smollm2_transformers, smollm2_weights
from tests.models.tiny import TINY_KINDS, VOCAB_SIZE, TinyKind, make_tiny_model
from tuft.models.branches import Branch
from tuft.models.decoder import Decoder
from tuft.models.load import load_weights
from tuft.models.lora import Adapter, Segment
from tuft.models.packed import PackedAttention
from tuft.types import LoraSpec


def packed_logits(decoder: Decoder, sequences: list[Tensor], segments: list[Segment]) -> list[Tensor]:
    lengths = [len(tokens) for tokens in sequences]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    branches = [Branch(stop - length, stop) for stop, length in zip(accumulate(lengths), lengths, strict=True)]
    with torch.no_grad():
        x_TD = decoder.hidden(torch.cat(sequences), positions_T, PackedAttention(branches, CPU), segments)
        return list(decoder.logits(x_TD, segments).split(lengths))


def random_tokens(vocab_size: int, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_logits_are_those_of_transformers(kind: TinyKind, tmp_path: Path) -> None:
    directory = make_tiny_model(kind, tmp_path)
    decoder = Decoder(load_weights(str(directory)), "float32", CPU)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sequences = random_tokens(VOCAB_SIZE, 5, 300, 5, 1)  # 300 is beyond the original context of the scaled ropes
    for actual, tokens in zip(packed_logits(decoder, sequences, []), sequences, strict=True):
        with torch.no_grad():
            expected = reference(tokens[None]).logits[0]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_embedded_models_logits_are_those_of_transformers() -> None:
    decoder = Decoder(smollm2_weights(), "float32", CPU)
    (tokens,) = random_tokens(49_152, 20)
    with torch.no_grad():
        expected = smollm2_transformers()(tokens[None]).logits[0]
    torch.testing.assert_close(packed_logits(decoder, [tokens], [])[0], expected, rtol=1e-3, atol=1e-3)


def test_a_sequence_does_not_see_its_neighbours_nor_their_adapters(tmp_path: Path) -> None:
    decoder = Decoder(load_weights(str(make_tiny_model("llama", tmp_path))), "float32", CPU)
    state = random_adapter_state(decoder.config, LoraSpec(rank=3, seed=0))
    adapter = Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=False)
    first, second, third = random_tokens(VOCAB_SIZE, 20, 20, 30)
    expected = packed_logits(decoder, [second], [])[0]

    logits = packed_logits(decoder, [first, second, third], [Segment(adapter, 0, 20), Segment(adapter, 40, 70)])

    assert torch.equal(logits[1], expected)
    assert not torch.equal(logits[2], packed_logits(decoder, [third], [])[0])
