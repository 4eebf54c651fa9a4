"""The training stream is the model's own chat template, and the weights mark exactly what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from render import Message, TemplateError, render_chat, template_tokens, to_data, to_datum

END_OF_TURN = "<|im_end|>"


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """Turns by turns, the user first."""
    messages = [Message(role="system", content=system)] if system is not None else []
    roles = ("user", "assistant")
    return messages + [Message(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


# Contents as the loader leaves them: stripped, and without the markup of the template itself. Control characters and
# unassigned code points are left out because SmolLM2's vocabulary lacks some of their bytes.
alphabet = st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn"), include_characters="\n\t")
contents = st.text(alphabet, min_size=1, max_size=60).map(str.strip).filter(lambda text: text and "<|" not in text)
conversations = st.builds(
    lambda pairs, open_end, system: chat(*(turn for pair in pairs for turn in pair), *open_end, system=system),
    pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=4),
    open_end=st.lists(contents, max_size=1),
    system=st.none() | contents,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations)
@example(messages=chat("Hi", "Hello, 42 times.\n\nBye", "x = 1\n\ty = 2", "🐚 ñandú"))
@example(messages=chat("Hi", "Hello", "again", system="Be brief."))
def test_training_tokens_are_the_template_and_weights_are_the_answers(smollm2: Any, messages: list[Message]) -> None:
    rendered = render_chat(smollm2, messages)

    assert rendered.tokens == template_tokens(smollm2, messages)
    said = [token for token, weight in zip(rendered.tokens, rendered.weights, strict=True) if weight == 1.0]
    answers = "".join(m["content"] + END_OF_TURN for m in messages if m["role"] == "assistant")
    assert smollm2.decode(said, clean_up_tokenization_spaces=False) == answers
    assert set(rendered.weights) == {0.0, 1.0}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations)
def test_before_every_answer_stands_the_generation_prompt(smollm2: Any, messages: list[Message]) -> None:
    rendered = render_chat(smollm2, messages)
    starts = [
        i for i, weight in enumerate(rendered.weights) if weight == 1.0 and (i == 0 or rendered.weights[i - 1] == 0.0)
    ]
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]

    prompts = [template_tokens(smollm2, messages[:turn], add_generation_prompt=True) for turn in turns]

    assert [rendered.tokens[:start] for start in starts] == prompts


def test_a_default_system_message_and_the_newline_after_a_turn_carry_no_weight(smollm2: Any) -> None:
    rendered = render_chat(smollm2, chat("Hi", "Hello"))

    parts = [(smollm2.decode([t]), w) for t, w in zip(rendered.tokens, rendered.weights, strict=True)]

    assert "SmolLM" in "".join(text for text, weight in parts if weight == 0.0)
    assert parts[-3:] == [("Hello", 1.0), (END_OF_TURN, 1.0), ("\n", 0.0)]


def test_a_datum_scores_each_token_at_the_position_before_it(smollm2: Any) -> None:
    rendered = render_chat(smollm2, chat("Hi", "Hello", "And?", "Bye"))

    datum = to_datum(rendered, max_tokens=10_000)

    assert datum.model_input.to_ints() == rendered.tokens[:-1]
    assert datum.loss_fn_inputs["target_tokens"].data == rendered.tokens[1:]
    assert datum.loss_fn_inputs["weights"].data == rendered.weights[1:]
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].dtype == "float32"


def test_a_long_conversation_is_cut_and_one_without_answers_left_is_dropped(smollm2: Any) -> None:
    long_answer = chat("Hi", "word " * 200)
    long_question = chat("word " * 200, "Hi")

    data = to_data(smollm2, [long_answer, long_question], max_tokens=64)

    assert [datum.model_input.length for datum in data] == [64]
    with pytest.raises(ValueError, match="max_tokens: got 64; none of 1 conversations"):
        to_data(smollm2, [long_question], max_tokens=64)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        # Drops what was said earlier, as templates of reasoning models do with thoughts.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{% if m.role == 'assistant' and not loop.last %}(past) {% endif %}{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            r"messages\[1\]: later messages change how this turn is written",
        ),
        # Opens an answer otherwise than it asks for one.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
            r"messages\[1\]: the answer does not continue the generation prompt",
        ),
        # Never says that a turn is over.
        (
            "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:\n{% endif %}",
            r"ends messages\[1\] without a special token",
        ),
    ],
)
def test_a_template_that_cannot_be_masked_is_named_with_its_turn(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch, template: str, problem: str
) -> None:
    monkeypatch.setattr(smollm2, "chat_template", template)

    with pytest.raises(TemplateError, match=problem) as raised:
        render_chat(smollm2, chat("Hi", "Hello", "And?", "Bye"))

    assert smollm2.name_or_path in str(raised.value)
