"""Attention over the cache against attention over everything at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.engine.reference import CPU
from tuft.engine.kv_cache import DecodeSpan, KvCache, PromptSpan, StepAttention
from tuft.models.architecture import DecoderConfig

LAYER = 1
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_config(num_heads: int = 6, num_kv_heads: int = 2) -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 96,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "eos_token_id": 2,
        }
    )


CONFIG = make_config()


def make_qkv(num_rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads)
    q, k, v = (torch.randn(num_rows, count, CONFIG.head_dim, generator=generator).to(dtype) for count in heads)
    return q, k, v


def expected_context(q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> torch.Tensor:
    """Causal attention of one whole sequence, in float64."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def prefill(cache: KvCache, qkv: tuple[torch.Tensor, ...], chunks: list[int]) -> torch.Tensor:
    out, start = [], 0
    for size in chunks:
        cache.extend(size)
        piece = tuple(x[start : start + size] for x in qkv)
        out.append(StepAttention([PromptSpan(0, size, cache)]).attend(LAYER, *piece))
        start += size
    return torch.cat(out)


def new_cache(num_sequences: int, capacity: int, dtype: torch.dtype) -> KvCache:
    cache = KvCache(CONFIG, num_sequences, capacity, dtype, CPU)
    cache.keys.fill_(torch.nan)  # memory that was never written may hold anything
    cache.values.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[1], [5], [16], [16, 16], [7, 16, 20], [33, 1, 1]])
def test_a_prompt_in_chunks_equals_a_prompt_at_once(chunks: list[int], dtype: torch.dtype) -> None:
    qkv = make_qkv(sum(chunks), dtype)
    out = prefill(new_cache(1, sum(chunks), dtype), qkv, chunks)
    torch.testing.assert_close(out.double(), expected_context(*qkv), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prompt", [1, 15, 16, 40])
@pytest.mark.parametrize("shares", [True, False])
def test_decoding_over_the_cache_equals_the_whole_sequence(num_prompt: int, shares: bool, dtype: torch.dtype) -> None:
    num_sequences, num_new = (3, 20) if shares else (1, 20)
    prompt = make_qkv(num_prompt, dtype, seed=9)
    prompt_cache = new_cache(1, num_prompt + (0 if shares else num_new), dtype)
    prefill(prompt_cache, prompt, [num_prompt])
    cache = new_cache(num_sequences, num_new, dtype) if shares else prompt_cache
    new = [make_qkv(num_new, dtype, seed=s) for s in range(num_sequences)]
    for step in range(num_new):
        cache.extend(1)
        q, k, v = (torch.stack([qkv[part][step] for qkv in new]) for part in range(3))
        span = DecodeSpan(0, num_sequences, cache, prompt_cache if shares else None)
        out = StepAttention([span]).attend(LAYER, q, k, v)
        for s in range(num_sequences):
            whole = tuple(torch.cat([prompt[part], new[s][part][: step + 1]]) for part in range(3))
            torch.testing.assert_close(out[s].double(), expected_context(*whole)[-1], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prompt", [3, 33, 200])
def test_a_sequence_has_the_same_bits_however_many_share_its_prompt(num_prompt: int, dtype: torch.dtype) -> None:
    prompt = make_qkv(num_prompt, dtype, seed=9)
    prompt_cache = new_cache(1, num_prompt, dtype)
    prefill(prompt_cache, prompt, [num_prompt])
    new = [make_qkv(30, dtype, seed=s) for s in range(8)]

    def decoded(sequences: list[int]) -> torch.Tensor:
        cache, out = new_cache(len(sequences), 30, dtype), []
        for step in range(30):
            cache.extend(1)
            q, k, v = (torch.stack([new[s][part][step] for s in sequences]) for part in range(3))
            out.append(DecodeSpan(0, len(sequences), cache, prompt_cache).attend(LAYER, q, k, v))
        return torch.stack(out)

    together = decoded(list(range(8)))
    for sequences in ([0], [5], [3, 1], [7, 2, 4], [6, 5, 4, 3, 2, 1, 0]):
        assert torch.equal(decoded(sequences), together[:, sequences])


def test_sequences_that_end_leave_the_others_as_they_are() -> None:
    new = [make_qkv(12, torch.float32, seed=s) for s in range(4)]
    cache, kept = new_cache(4, 12, torch.float32), [0, 1, 2, 3]
    for step in range(12):
        if step == 5:
            kept = [1, 3]
            cache.keep(kept)
        cache.extend(1)
        q, k, v = (torch.stack([new[s][part][step] for s in kept]) for part in range(3))
        out = DecodeSpan(0, len(kept), cache, None).attend(LAYER, q, k, v)
        for row, s in enumerate(kept):
            whole = tuple(x[: step + 1] for x in new[s])
            torch.testing.assert_close(out[row].double(), expected_context(*whole)[-1], atol=1e-5, rtol=0)


def test_spans_of_one_step_do_not_see_each_other() -> None:
    first, second = make_qkv(4, torch.float32, seed=1), make_qkv(6, torch.float32, seed=2)
    caches = [new_cache(1, 10, torch.float32) for _ in range(2)]
    caches[0].extend(4)
    caches[1].extend(6)
    packed = tuple(torch.cat([a, b]) for a, b in zip(first, second, strict=True))
    attention = StepAttention([PromptSpan(0, 4, caches[0]), PromptSpan(4, 10, caches[1])])
    out = attention.attend(LAYER, *packed)
    torch.testing.assert_close(out[:4].double(), expected_context(*first), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[4:].double(), expected_context(*second), atol=1e-5, rtol=0)
