"""The options of chat_sft.py: one frozen record, from the command line or made by hand (in a notebook)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_STEPS = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. `steps` wins over `epochs` (passes over the training set); with neither it is DEFAULT_STEPS."""

    base_url: str = "http://localhost:10610"
    api_key: str = ""
    base_model: str | None = None
    dataset: str | None = None
    rank: int = 8
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = False
    learning_rate: float = 1e-4
    schedule: Literal["linear", "constant"] = "linear"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    max_tokens: int = 1024
    eval_every: int = 20
    num_test: int = 32
    max_train: int | None = None
    answer_tokens: int = 100
    seed: int = 0
    out: Path = Path("out/chat_sft")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    default = Settings()
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description="Supervised fine-tuning of a LoRA adapter on chats.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--base-url", default=os.environ.get("TINKER_BASE_URL", default.base_url), help="the server")
    add("--api-key", default=os.environ.get("TINKER_API_KEY"), help="default: TINKER_API_KEY", metavar="tml-...")
    add("--base-model", default=None, help="default: the server's first")
    add(
        "--dataset",
        default=None,
        help="hub id, .jsonl file of messages, or 'lighthouse'; default: no_robots of the hub",
    )
    add("--rank", type=_positive, default=default.rank, help="LoRA rank")
    add("--train-mlp", action=flag, default=default.train_mlp, help="adapt the MLP layers")
    add("--train-attn", action=flag, default=default.train_attn, help="adapt the attention layers")
    add("--train-unembed", action=flag, default=default.train_unembed, help="adapt the output head")
    add("--learning-rate", type=float, default=default.learning_rate, help="Adam's, at the first step")
    add("--schedule", choices=("linear", "constant"), default=default.schedule, help="linear: falls to 0")
    add("--steps", type=_positive, default=None, help=f"optimizer steps; without --epochs {DEFAULT_STEPS}")
    add("--epochs", type=float, default=None, help="passes over the training set; --steps wins over it")
    add("--batch-size", type=_positive, default=default.batch_size, help="conversations a step")
    add("--max-tokens", type=_positive, default=default.max_tokens, help="longer conversations are cut at their end")
    add("--eval-every", type=_positive, default=default.eval_every, help="steps between two looks at the test set")
    add("--num-test", type=_positive, default=default.num_test, help="most held-out conversations to measure on")
    add("--max-train", type=_positive, default=None, help="use only so many conversations to train on")
    add("--answer-tokens", type=_positive, default=default.answer_tokens, help="most tokens of an answer")
    add("--seed", type=int, default=default.seed, help="of the adapter, the batches and a drawn test set")
    add("--out", type=Path, default=default.out, help="where the results go")
    options = vars(parser.parse_args(arguments))
    if not options["api_key"]:
        parser.error("no API key: give --api-key or set TINKER_API_KEY (`tuft launch` prints one)")
    return Settings(**options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}; must be at least 1")
    return value
