"""The same held-out prompts put to a model before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tinker
from conversations import ChatDataset
from render import Message, template_tokens
from rich.console import Console
from rich.table import Table


def held_out_prompts(dataset: ChatDataset, count: int = 3) -> list[list[Message]]:
    """The first `count` held-out conversations, each up to where the assistant first answers."""
    return [
        messages[: next(i for i, message in enumerate(messages) if message["role"] == "assistant")]
        for messages in dataset.test[:count]
    ]


def ask(
    sampler: tinker.SamplingClient, tokenizer: Any, prompts: Sequence[Sequence[Message]], max_tokens: int
) -> list[str]:
    """Greedy answers to all prompts, sampled together; one that was cut at `max_tokens` ends in " ..."."""
    params = tinker.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    futures = [
        sampler.sample(
            prompt=tinker.ModelInput.from_ints(template_tokens(tokenizer, prompt, add_generation_prompt=True)),
            num_samples=1,
            sampling_params=params,
        )
        for prompt in prompts
    ]
    answers = []
    for future in futures:
        sequence = future.result().sequences[0]
        text = tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()
        answers.append(f"{text} ..." if sequence.stop_reason == "length" else text)
    return answers


def show_answers(
    console: Console, prompts: Sequence[Sequence[Message]], before: Sequence[str], after: Sequence[str], path: Path
) -> None:
    """Side by side on the screen, one under the other in `path`."""
    table = Table("held-out prompt", "before", "after", title="Answers of the base model and of the tuned one")
    sections = []
    for prompt, old, new in zip(prompts, before, after, strict=True):
        question = "\n".join(f"[{m['role']}] {m['content']}" if m["role"] != "user" else m["content"] for m in prompt)
        table.add_row(*(text.replace("[", "\\[") for text in (question, old, new)), end_section=True)
        sections.append(f"## {question}\n\n**Before**\n\n{old}\n\n**After**\n\n{new}\n")
    path.write_text("# Held-out prompts before and after training\n\n" + "\n".join(sections), encoding="utf-8")
    console.print(table)
