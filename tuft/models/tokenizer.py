"""Tokenizer files as Hugging Face has them, so that clients and the sampler agree on every id."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import tuft
from tuft.errors import ModelError
from tuft.models.gguf import GgufFile
from tuft.models.source import resolve_source

_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "config.json",
    "generation_config.json",
)
_STAMP = ".made-from"
_GGUF_CONTROL_TOKEN = 3  # value of tokenizer.ggml.token_type for tokens such as <|im_end|>


def write_tokenizer_files(path: str, tokenizer_dir: Path) -> None:
    """Write the tokenizer of base model ``path`` (GGUF file, directory or hub id) into ``tokenizer_dir``.

    Afterwards ``transformers.AutoTokenizer.from_pretrained(tokenizer_dir)`` gives the model's ids and chat template.
    Nothing is done if the directory was written from the same files by the same TuFT; else it is replaced whole, so
    that a reader never meets half of it. One process at a time. Raises ModelError if the source has no tokenizer or
    one that is not supported, or if the directory holds something that TuFT did not write.
    """
    source = resolve_source(path)
    stamp = _stamp(source)
    try:
        if (tokenizer_dir / _STAMP).is_file():
            if (tokenizer_dir / _STAMP).read_text(encoding="utf-8") == stamp:
                return
        elif tokenizer_dir.is_dir() and any(tokenizer_dir.iterdir()):
            raise ModelError(f"{tokenizer_dir}: holds files that TuFT did not write; give an empty or a new directory")
        fresh = tokenizer_dir.with_name(f".{tokenizer_dir.name}-{os.getpid()}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            if source.is_file():
                _write_from_gguf(GgufFile(source), fresh)
            else:
                _copy(source, fresh)
            (fresh / _STAMP).write_text(stamp, encoding="utf-8")
            _replace_directory(tokenizer_dir, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{tokenizer_dir}: tokenizer files of {path} cannot be written: {error}") from error


def load_tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The tokenizer of a directory written by ``write_tokenizer_files``; it never truncates or pads."""
    file = tokenizer_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise ModelError(f"{file}: cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stamp(source: Path) -> str:
    """Identifies what tokenizer files are made of: source files with size and time, and our own version; hashed,
    since the directory is public and paths of this machine are not."""
    files = [source] if source.is_file() else [source / name for name in _COPIED_FILES]
    stats = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps([tuft.__version__, stats]).encode()).hexdigest()


def _replace_directory(target: Path, fresh: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    stale = target.with_name(f"{fresh.name}-stale")
    target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale)


def _copy(source: Path, directory: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise ModelError(f"{source}: has no tokenizer.json; only tokenizers in that format are supported")
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _write_from_gguf(gguf: GgufFile, directory: Path) -> None:
    tokens: list[str] = gguf.required("tokenizer.ggml.tokens")
    special = [
        token
        for token, kind in zip(tokens, gguf.required("tokenizer.ggml.token_type"), strict=True)
        if kind == _GGUF_CONTROL_TOKEN
    ]
    _gguf_tokenizer(gguf, tokens, special).save(str(directory / "tokenizer.json"))

    named = {
        f"{role}_token": tokens[gguf.metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in gguf.metadata
    }
    config_json = gguf.hf_config()
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; GPT2Tokenizer would rebuild it
        **named,
        "added_tokens_decoder": {str(tokens.index(token)): _added_token_entry(token) for token in special},
        "chat_template": gguf.metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config_json["max_position_embeddings"],
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "special_tokens_map.json", named)
    _write_json(directory / "config.json", config_json)


def _gguf_tokenizer(gguf: GgufFile, tokens: list[str], special: list[str]) -> Tokenizer:
    """Byte-level BPE that splits every digit, which is what ``pre`` = smollm means."""
    kind = (gguf.required("tokenizer.ggml.model"), gguf.required("tokenizer.ggml.pre"))
    adds_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", False)
    if kind != ("gpt2", "smollm") or adds_bos:
        raise ModelError(
            f"{gguf.path}: tokenizer: got model {kind[0]!r}, pre {kind[1]!r}, add_bos_token {adds_bos}; only 'gpt2', "
            "'smollm', False is supported in a GGUF file: give the model's directory of safetensors or its hub id"
        )
    merges = [tuple(merge.split(" ")) for merge in gguf.required("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _added_token_entry(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
