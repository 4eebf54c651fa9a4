"""Tokenizer files as transformers reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.models.test_gguf import write_gguf
from tests.models.tiny import make_tiny_model, tiny_tokenizer
from tuft.embedded import find_embedded
from tuft.errors import ModelError
from tuft.models.tokenizer import load_tokenizer, write_tokenizer_files

CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 12 times 12?"},
]
# "You are a helpful AI assistant named SmolLM, trained by Hugging Face" as SmolLM2's own tokenizer has it
SYSTEM_IDS = [9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]


@pytest.fixture(scope="module")
def smollm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizers") / "smollm"
    write_tokenizer_files(str(find_embedded()), directory)
    return directory


@pytest.fixture(scope="module")
def smollm(smollm_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm_dir)


@pytest.fixture(scope="module")
def sampler(smollm_dir: Path) -> Tokenizer:
    return load_tokenizer(smollm_dir)


def test_the_embedded_tokenizer_has_smollm2s_vocabulary_and_special_ids(smollm: PreTrainedTokenizerBase) -> None:
    assert len(smollm) == smollm.vocab_size == 49_152
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.pad_token_id, smollm.unk_token_id) == (1, 2, 2, 0)
    assert smollm.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert smollm.model_max_length == 8192


def test_every_control_token_is_one_id_that_decoding_can_skip(smollm: PreTrainedTokenizerBase) -> None:
    for token_id in range(17):
        token = smollm.convert_ids_to_tokens(token_id)
        assert smollm.encode(f"a{token}b") == [*smollm.encode("a"), token_id, *smollm.encode("b")]
        assert smollm.decode([token_id], skip_special_tokens=True) == ""


def test_every_digit_is_a_token(smollm: PreTrainedTokenizerBase) -> None:
    assert smollm.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert smollm.encode("0123456789") == list(range(32, 42))


def test_a_conversation_is_rendered_as_the_model_was_trained(smollm: PreTrainedTokenizerBase) -> None:
    text = smollm.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 12 times 12?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = smollm.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids[: 1 + len(SYSTEM_IDS) + 2] == [1, *SYSTEM_IDS, 2, 198]
    assert ids == smollm.encode(text)
    assert (ids.count(1), ids.count(2)) == (5, 4)


# SmolLM2's vocabulary lacks the bytes of some control and unassigned characters: they vanish there, as in the original.
KNOWN_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"), include_characters="\t\n\r"))


@given(text=KNOWN_TEXT)
def test_text_round_trips_and_the_sampler_sees_the_clients_ids(
    smollm: PreTrainedTokenizerBase, sampler: Tokenizer, text: str
) -> None:
    ids = smollm.encode(text)
    assert sampler.encode(text).ids == ids
    assert smollm.decode(ids) == sampler.decode(ids, skip_special_tokens=False) == text


def test_a_directorys_tokenizer_is_the_same_after_copying(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    copied = tmp_path / "deep" / "tokenizer"
    write_tokenizer_files(str(model), copied)

    original, copy = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(copied)
    assert copy.get_vocab() == original.get_vocab() == tiny_tokenizer().get_vocab()
    assert copy.eos_token_id == 2
    expected = original.apply_chat_template(CHAT, tokenize=False)
    assert copy.apply_chat_template(CHAT, tokenize=False) == expected
    assert "<|im_start|>assistant\n4<|im_end|>" in expected
    assert json.loads((copied / "config.json").read_text())["model_type"] == "qwen3"
    assert not list(copied.glob("*.safetensors"))


def test_a_tokenizer_is_written_once_and_again_when_its_source_changes(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    target = tmp_path / "tokenizer"
    write_tokenizer_files(str(model), target)
    first = (target / "tokenizer.json").stat()
    write_tokenizer_files(str(model), target)
    assert (target / "tokenizer.json").stat() == first

    config_file = model / "tokenizer_config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "eos_token": "<|endoftext|>"}))
    os.utime(config_file, ns=(1, 1))
    write_tokenizer_files(str(model), target)
    assert AutoTokenizer.from_pretrained(target).eos_token_id == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "tokenizer"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    target = tmp_path / "tokenizer"
    write_tokenizer_files(str(model), target)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"model: has no tokenizer\.json"):
        write_tokenizer_files(str(model), target)
    assert load_tokenizer(target).get_vocab_size() == 384
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "tokenizer"]


def test_a_directory_that_tuft_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    with pytest.raises(ModelError, match="holds files that TuFT did not write"):
        write_tokenizer_files(str(model), model)
    assert (model / "model.safetensors").is_file()


def test_a_gguf_tokenizer_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.token_type": [1, 1],
    }
    file = write_gguf(tmp_path / "model.gguf", {}, metadata)
    with pytest.raises(ModelError, match="got model 'gpt2', pre 'qwen2'"):
        write_tokenizer_files(str(file), tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


def test_a_loaded_tokenizer_never_truncates_or_pads(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(model).encode("Call me Ishmael").ids) > 2


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
