"""Tiny random models of every supported architecture, saved as Hugging Face saves them, with a small real tokenizer.

from tests.models.tiny import make_tiny_model

directory = make_tiny_model("qwen3", tmp_path / "qwen3")
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TinyKind = Literal["llama", "llama3", "llama-tied", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "yarn"]
TINY_KINDS: tuple[TinyKind, ...] = get_args(TinyKind)

VOCAB_SIZE = 384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1 and 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = [
    "Four score and seven years ago our fathers brought forth, upon this continent, a new nation.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))",
    "Why is the sky blue? Because air scatters short waves more than long ones: 0123456789.",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,  # larger than usual, so that logits are far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_KINDS: dict[TinyKind, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "llama-tied": {"model_type": "llama", "num_attention_heads": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},  # heads wider than hidden_size / num_attention_heads
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "yarn": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": _YARN_ROPE},
}


def make_tiny_model(
    kind: TinyKind,
    directory: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random model of ``kind`` and its tokenizer under ``directory``, and return it.

    ``overrides`` are configuration keys, e.g. ``num_hidden_layers=1``. About 0.1 million parameters.
    """
    options = {**_COMMON, **_KINDS[kind], **overrides}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", "bias")):
                parameter.data += 0.1 * torch.randn_like(parameter)  # else all ones and zeros, which hide mistakes
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``VOCAB_SIZE`` tokens: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
