"""What is computed: the same data, prompts and adapters for every variant of a benchmark.

Shape letters: ``T`` tokens of one sequence, ``S`` tokens of all texts one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from tests.engine.reference import random_adapter_state
from tuft.embedded import EMBEDDED_NAME, find_embedded
from tuft.models.architecture import DecoderConfig
from tuft.models.tokenizer import load_tokenizer, write_tokenizer_files
from tuft.prefixes import cut
from tuft.types import AdapterState, Datum, Int64Array, LoraSpec

PACKAGED_CHATS = Path(__file__).parents[1] / "examples/chat_sft/data/lighthouse_train.jsonl"


@dataclass(frozen=True)
class BaseModel:
    """``path``: a GGUF file, or a directory that transformers reads too."""

    name: str
    path: str

    @classmethod
    def embedded(cls) -> BaseModel:
        return cls(EMBEDDED_NAME, str(find_embedded()))


class Text:
    """An endless stream of tokens of real chats."""

    def __init__(self, tokens_S: Int64Array, start: int = 0) -> None:
        self._tokens_S = tokens_S
        self._taken = start

    def at(self, start: int) -> Text:
        """The same text from another place on."""
        return Text(self._tokens_S, start)

    @classmethod
    def of_chats(cls, base: BaseModel, chats: Path | None = None) -> Text:
        """The messages of ``chats``, or of the packaged chats, as ``base`` tokenises them."""
        tokenizer = load_tokenizer(_tokenizer_dir(base.path))
        lines = (chats or PACKAGED_CHATS).read_text(encoding="utf-8").splitlines()
        texts = ["\n".join(message["content"] for message in json.loads(line)["messages"]) for line in lines]
        return cls(np.concatenate([encoding.ids for encoding in tokenizer.encode_batch(texts)]).astype(np.int64))

    def take(self, count: int) -> Int64Array:
        """The next ``count`` tokens; from the beginning again where they end."""
        first, self._taken = self._taken, self._taken + count
        return self._tokens_S.take(range(first, first + count), mode="wrap")


@cache
def _tokenizer_dir(path: str) -> Path:
    directory = Path(mkdtemp(prefix="tuft-bench-")) / "tokenizer"
    write_tokenizer_files(path, directory)
    return directory


def tokenizer_dir(base: BaseModel) -> str:
    return str(_tokenizer_dir(base.path))


def adapter_states(config: DecoderConfig, spec: LoraSpec, count: int) -> Iterator[AdapterState]:
    """All different, and as after some training."""
    for seed in range(count):
        yield random_adapter_state(config, replace(spec, seed=seed), seed, size=0.01)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One step of several tenants; ``tenants[n]`` are the data of one forward_backward."""

    title: str
    spec: LoraSpec
    tenants: tuple[tuple[Datum, ...], ...]

    @property
    def data(self) -> tuple[Datum, ...]:
        return tuple(datum for data in self.tenants for datum in data)

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.data)

    def num_rows(self, max_rows: int) -> int:
        """Distinct tokens, when operations are cut into passes of ``max_rows``."""
        cuts = (cut([datum.tokens_T for datum in data], max_rows) for data in self.tenants)
        return sum(piece.num_rows for of_one in cuts for piece in of_one)

    def as_one_tenant(self) -> Training:
        """The same tokens, as if they were all of one tenant."""
        return Training(f"{self.title}, as one tenant", self.spec, (self.data,))


def datum_of(text: Text, length: int) -> Datum:
    """Consecutive text; the second half is trained on."""
    tokens_T = text.take(length + 1)
    weights_T = (np.arange(length) >= length // 2).astype(np.float32)
    return Datum(tokens_T[:-1], {"target_tokens": tokens_T[1:], "weights": weights_T})


def equal(text: Text, spec: LoraSpec, num_tenants: int, num_sequences: int, length: int) -> Training:
    title = f"{num_tenants} tenant{'s' * (num_tenants > 1)}, {num_sequences} x {length} tokens each"
    return Training(
        title, spec, tuple(tuple(datum_of(text, length) for _ in range(num_sequences)) for _ in range(num_tenants))
    )


def ragged(text: Text, spec: LoraSpec, num_tenants: int = 4, num_sequences: int = 4, longest: int = 512) -> Training:
    """Lengths drawn evenly from an eighth of the longest on."""
    lengths = np.random.default_rng(0).integers(longest // 8, longest + 1, (num_tenants, num_sequences)).tolist()
    tenants = tuple(tuple(datum_of(text, length) for length in of_one) for of_one in lengths)
    padded = sum(max(of_one) * num_sequences for of_one in lengths)
    title = f"{num_tenants} tenants, {num_sequences} sequences of {longest // 8} to {longest} tokens each"
    return Training(f"{title} (padded: {padded})", spec, tenants)


def grpo(text: Text, spec: LoraSpec, group: int = 8, prompt: int = 512, answer: int = 64) -> Training:
    """A group of answers to one prompt, each weighted by its advantage; the prompt is not trained on."""
    rng = np.random.default_rng(0)
    prompt_T = text.take(prompt)
    data = []
    for _ in range(group):
        tokens_T = np.concatenate([prompt_T, text.take(answer + 1)])
        weights_T = np.where(np.arange(prompt + answer) >= prompt - 1, rng.normal(), 0.0).astype(np.float32)
        data.append(Datum(tokens_T[:-1], {"target_tokens": tokens_T[1:], "weights": weights_T}))
    return Training(f"1 tenant, {group} answers of {answer} tokens to a prompt of {prompt}", spec, (tuple(data),))


TRAINING: Mapping[str, Callable[[Text, LoraSpec], Training]] = {
    "one": lambda text, spec: equal(text, spec, 1, 4, 256),
    "eight": lambda text, spec: equal(text, spec, 8, 4, 256),
    "small16": lambda text, spec: equal(text, spec, 16, 1, 64),
    "ragged": ragged,
    "grpo": grpo,
}


@dataclass(frozen=True)
class Optimizer:
    """``num_runs`` updates that are due together."""

    spec: LoraSpec
    num_runs: int = 16


# --- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """``num_requests`` prompts, ``num_samples`` continuations of each; request n uses adapter n % ``num_adapters``.
    With ``shares_prompt`` all requests have one prompt. No sequence ends before ``num_new`` tokens."""

    num_requests: int
    num_samples: int = 1
    num_adapters: int = 0
    num_prompt: int = 64
    num_new: int = 64
    shares_prompt: bool = False

    @property
    def num_sequences(self) -> int:
        return self.num_requests * self.num_samples

    def prompts(self, text: Text) -> list[Int64Array]:
        """Fresh ones for every round: what was computed for earlier prompts must not help."""
        if self.shares_prompt:
            return [text.take(self.num_prompt)] * self.num_requests
        return [text.take(self.num_prompt) for _ in range(self.num_requests)]


SAMPLING: Mapping[str, Sampling] = {
    "1": Sampling(1),
    "1, one adapter": Sampling(1, num_adapters=1),
    "8": Sampling(8),
    "8, one adapter": Sampling(8, num_adapters=1),
    "8, 8 adapters": Sampling(8, num_adapters=8),
    "32": Sampling(32),
    "32, one adapter": Sampling(32, num_adapters=1),
    "32, 8 adapters": Sampling(32, num_adapters=8),
    "32, 32 adapters": Sampling(32, num_adapters=32),
    "4 x 8": Sampling(4, num_samples=8),
    "4 x 8, one adapter": Sampling(4, num_samples=8, num_adapters=1),
    "8, prompts of 512": Sampling(8, num_prompt=512),
    "8, one prompt of 512": Sampling(8, num_prompt=512, shares_prompt=True),
}


def texts_of(text: Text, cases: Mapping[str, Sampling]) -> dict[str, Text]:
    """A stream of its own for every case, so that all variants meet the same prompts in the same rounds."""
    return {name: text.at(7919 * number) for number, name in enumerate(cases)}
