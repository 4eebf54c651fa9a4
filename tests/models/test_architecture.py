"""DecoderConfig against transformers, the oracle, and against configurations that it must refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.tiny import TINY_KINDS, TinyKind, make_tiny_model
from tuft.errors import ModelError
from tuft.models.architecture import DecoderConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3_BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def refusal(**changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        DecoderConfig.from_hf({**LLAMA, **changes})
    return str(caught.value)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_tensor_names_and_shapes_are_those_of_transformers(kind: TinyKind, tmp_path: Path) -> None:
    directory = make_tiny_model(kind, tmp_path)
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(directory)

    assert config.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert config.num_parameters == model.num_parameters()
    assert config.rms_norm_eps == model.config.rms_norm_eps


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **LLAMA3_BANDS},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5},
    ],
    ids=lambda rope: "-".join(str(value) for value in rope.values()),
)
@pytest.mark.parametrize("rope_theta", [10_000.0, 1_000_000.0])
def test_rope_frequencies_are_those_of_transformers_to_the_last_place(rope: dict[str, Any], rope_theta: float) -> None:
    config_json = {**LLAMA, "head_dim": 128, "rope_parameters": {**rope, "rope_theta": rope_theta}}
    config = DecoderConfig.from_hf(config_json)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_json)).model.rotary_emb

    assert config.rope_inv_freq().dtype == np.float32
    np.testing.assert_array_almost_equal_nulp(config.rope_inv_freq(), oracle.inv_freq.numpy(), nulp=2)
    attention_factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    assert attention_factor == oracle.attention_scaling


def test_the_layouts_of_transformers_4_and_5_mean_the_same() -> None:
    old = {**LLAMA, "rope_theta": 500_000.0, "rope_scaling": {"type": "llama3", **LLAMA3_BANDS}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3_BANDS}}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    assert DecoderConfig.from_hf({**LLAMA, "rope_scaling": None, "rope_theta": 5e5}).rope_theta == 500_000.0
    assert DecoderConfig.from_hf(LLAMA).rope_theta == 10_000.0


def test_end_of_sequence_may_be_one_id_or_a_list_or_absent() -> None:
    assert DecoderConfig.from_hf({**LLAMA, "eos_token_id": 7}).eos_token_ids == (7,)
    assert DecoderConfig.from_hf({**LLAMA, "eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert DecoderConfig.from_hf(LLAMA).eos_token_ids == ()
    assert DecoderConfig.from_hf({**LLAMA, "bos_token_id": 0}).bos_token_id == 0
    assert DecoderConfig.from_hf({**LLAMA, "bos_token_id": None}).bos_token_id is None


def test_head_dim_is_derived_where_it_is_absent() -> None:
    assert DecoderConfig.from_hf({**LLAMA, "head_dim": None}).head_dim == 16
    assert DecoderConfig.from_hf({**LLAMA, "architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    assert DecoderConfig.from_hf({**LLAMA, "num_key_value_heads": None}).num_kv_heads == 4


def test_linear_shapes_name_every_linear_layer_as_peft_does() -> None:
    shapes = DecoderConfig.from_hf({**LLAMA, "head_dim": 32, "tie_word_embeddings": True}).linear_shapes()
    assert len(shapes) == 2 * 7 + 1
    assert shapes["model.layers.1.self_attn.q_proj"] == (128, 64)
    assert shapes["model.layers.1.self_attn.k_proj"] == (64, 64)
    assert shapes["model.layers.1.self_attn.o_proj"] == (64, 128)
    assert shapes["model.layers.0.mlp.down_proj"] == (64, 128)
    assert list(shapes)[-1] == "lm_head"
    assert shapes["lm_head"] == (512, 64)


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones() -> None:
    message = refusal(architectures=["GptOssForCausalLM"])
    assert "GptOssForCausalLM" in message
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in message
    assert "model_type 'mamba'" in refusal(architectures=None, model_type="mamba")
    assert DecoderConfig.from_hf({**LLAMA, "architectures": None}).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type", "'dynamic'", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor", "None"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"vocab_size": "512"}, ["vocab_size", "'512'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "4", "3"]),
    ],
)
def test_what_the_decoder_would_compute_wrongly_is_refused_by_name(changes: dict[str, Any], named: list[str]) -> None:
    message = refusal(**changes)
    assert all(word in message for word in named), message


def test_a_sliding_window_shorter_than_the_context_is_refused_until_the_context_is_lowered() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 1024}
    with pytest.raises(ModelError, match="at most 1024"):
        DecoderConfig.from_hf(mistral)
    assert DecoderConfig.from_hf(mistral, max_context_tokens=1024).max_context_tokens == 1024
    assert DecoderConfig.from_hf({**mistral, "sliding_window": None}).max_context_tokens == 4096


def test_a_sliding_window_that_no_layer_uses_is_harmless() -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024, "max_window_layers": 1}
    assert DecoderConfig.from_hf({**qwen, "use_sliding_window": False}).max_context_tokens == 4096
    assert DecoderConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 2})
    full = ["full_attention", "full_attention"]
    assert DecoderConfig.from_hf({**qwen, "use_sliding_window": True, "layer_types": full})
    with pytest.raises(ModelError, match="sliding_window 1024"):
        DecoderConfig.from_hf({**qwen, "use_sliding_window": True})


def test_the_context_can_be_lowered_but_not_raised() -> None:
    assert DecoderConfig.from_hf(LLAMA, max_context_tokens=100).max_context_tokens == 100
    with pytest.raises(ModelError, match="got 4097; the model's own limit is 4096"):
        DecoderConfig.from_hf(LLAMA, max_context_tokens=4097)


def test_the_module_loads_no_torch() -> None:
    program = "import sys, tuft.models.architecture, tuft.models.gguf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
