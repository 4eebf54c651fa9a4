"""From chat messages to training tokens: the model's own chat template, weight 1 on what the assistant says.

The tokens are those of `tokenizer.apply_chat_template(messages)`, unchanged, so the model is trained on exactly the
stream it sees when it is asked to answer. The weights are found in that stream: for each assistant turn,

    prompt = template(messages[:turn], add_generation_prompt=True)     what the model is given
    spoken = template(messages[:turn + 1])                             the same, and then the answer

`prompt` has to be a prefix of `spoken`, and `spoken` of the whole conversation. The tokens between the two, up to and
including the end-of-turn token, are the assistant's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import tinker


class Message(TypedDict):
    role: str
    content: str


class TemplateError(ValueError):
    """A chat template cannot be used for multi-turn training as it is."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """One conversation as tokens; `weights[i]` is 1.0 where the assistant itself says `tokens[i]`, else 0.0."""

    tokens: list[int]
    weights: list[float]


def template_tokens(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
    """The token ids of the model's chat template; with `add_generation_prompt` it ends where an answer begins."""
    return list(
        tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    )


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> RenderedChat:
    """Tokens of the whole conversation and their weights. Raises TemplateError where no exact mask exists."""
    tokens = template_tokens(tokenizer, messages)
    weights = [0.0] * len(tokens)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template_tokens(tokenizer, messages[:turn], add_generation_prompt=True)
        spoken = template_tokens(tokenizer, messages[: turn + 1])
        _require_prefix(tokenizer, prompt, spoken, turn, "the answer does not continue the generation prompt")
        _require_prefix(
            tokenizer,
            spoken,
            tokens,
            turn,
            "later messages change how this turn is written (split such chats, one answer each)",
        )
        stop = _end_of_turn(tokenizer, spoken, len(prompt), turn)
        weights[len(prompt) : stop] = [1.0] * (stop - len(prompt))
    return RenderedChat(tokens, weights)


def to_datum(chat: RenderedChat, max_tokens: int) -> tinker.Datum:
    """The next-token shift: position t reads tokens[t] and is scored on tokens[t + 1] with weights[t + 1].

    A conversation longer than `max_tokens` inputs is cut at its end.
    """
    tokens, weights = chat.tokens[: max_tokens + 1], chat.weights[: max_tokens + 1]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:], dtype=np.int64)),
            "weights": tinker.TensorData.from_numpy(np.array(weights[1:], dtype=np.float32)),
        },
    )


def to_data(tokenizer: Any, conversations: Sequence[Sequence[Message]], max_tokens: int) -> list[tinker.Datum]:
    """Every conversation as a datum, without those of which no assistant token is left within `max_tokens`.

    Raises ValueError if that leaves none.
    """
    data = [to_datum(render_chat(tokenizer, messages), max_tokens) for messages in conversations]
    kept = [datum for datum in data if any(datum.loss_fn_inputs["weights"].data)]
    if not kept:
        raise ValueError(f"max_tokens: got {max_tokens}; none of {len(data)} conversations has an answer that early")
    return kept


def _require_prefix(tokenizer: Any, prefix: list[int], tokens: list[int], turn: int, problem: str) -> None:
    if tokens[: len(prefix)] == prefix:
        return
    same = next((i for i, (a, b) in enumerate(zip(prefix, tokens, strict=False)) if a != b), len(tokens))
    raise TemplateError(
        f"the chat template of {_name(tokenizer)} cannot be masked exactly: messages[{turn}]: {problem}; "
        f"at token {same} expected {tokenizer.decode(prefix[same : same + 8])!r}, "
        f"found {tokenizer.decode(tokens[same : same + 8])!r}"
    )


def _end_of_turn(tokenizer: Any, tokens: list[int], start: int, turn: int) -> int:
    """One past the special token that ends the turn. What the template writes after it (SmolLM2: a newline) is not
    the assistant's: sampling stops before it."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for index in range(len(tokens) - 1, start - 1, -1):
        if tokens[index] in special:
            return index + 1
    raise TemplateError(
        f"the chat template of {_name(tokenizer)} ends messages[{turn}] without a special token, "
        "so the model could not learn where to stop"
    )


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
