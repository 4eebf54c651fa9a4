"""The mathematics of sampling against its definitions, written out naively."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.tiny import tiny_tokenizer
from tuft.engine.sampling import (
    Draw,
    StopRule,
    alternative_uniforms,
    check_params,
    draw_tokens,
    inverse_cdf,
    likeliest,
    uniforms,
)
from tuft.errors import InvalidInput
from tuft.types import SamplingParams


def uniform(seed: int, sample_index: int, position: int) -> float:
    return uniforms(seed, sample_index, position, 1)[0]


VOCAB_SIZE = 1000  # not a multiple of the blocks that the draw sums


def draw(
    logits: torch.Tensor, u: float, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0
) -> tuple[int, float]:
    (token,), (logprob,) = draw_tokens(logits[None], [Draw(temperature, top_k, top_p, u)])
    return token, logprob


def random_logits(seed: int = 0, rows: int = 1, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def counted(logits: torch.Tensor, num_draws: int, **options: float) -> np.ndarray:
    """How often each token is drawn when the uniforms are spread evenly over [0, 1)."""
    draws = [
        Draw(
            options.get("temperature", 1.0),
            int(options.get("top_k", -1)),
            options.get("top_p", 1.0),
            (n + 0.5) / num_draws,
        )
        for n in range(num_draws)
    ]
    tokens, _ = draw_tokens(logits.expand(num_draws, -1).contiguous(), draws)
    return np.bincount(tokens, minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    logits = random_logits()
    expected = torch.softmax(logits[0].double() / temperature, dim=-1).numpy()
    counts = counted(logits, 10_000, temperature=temperature)
    np.testing.assert_allclose(counts / 10_000, expected, atol=2e-4)


def test_the_logprob_is_that_of_the_temperature_scaled_distribution() -> None:
    logits = random_logits()[0]
    for u in (0.0, 0.3, 0.99):
        token, logprob = draw(logits, u, temperature=0.7, top_k=5, top_p=0.9)
        assert logprob == pytest.approx(float(torch.log_softmax(logits / 0.7, -1)[token]), abs=1e-5)


def test_temperature_zero_takes_the_likeliest_token_with_its_unscaled_logprob() -> None:
    logits = random_logits()[0]
    token, logprob = draw(logits, 0.99, temperature=0.0)
    assert token == int(logits.argmax())
    assert logprob == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-5)


def test_top_k_draws_among_the_k_likeliest_in_proportion() -> None:
    logits = random_logits()
    counts = counted(logits, 5000, top_k=3)
    best = logits[0].topk(3).indices.numpy()
    assert set(np.nonzero(counts)[0]) == set(best)
    probs = torch.softmax(logits[0].double(), -1).numpy()
    np.testing.assert_allclose(counts[best] / 5000, probs[best] / probs[best].sum(), atol=1e-3)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_draws_among_the_fewest_tokens_that_reach_it(top_p: float) -> None:
    logits = random_logits()
    probs, order = torch.softmax(logits[0].double(), -1).sort(descending=True)
    num_kept = int((probs.cumsum(0) < top_p).sum()) + 1
    counts = counted(logits, 10_000, top_p=top_p)
    assert set(np.nonzero(counts)[0]) <= set(order[:num_kept].tolist())
    np.testing.assert_allclose(counts[order[:num_kept]] / 10_000, probs[:num_kept] / probs[:num_kept].sum(), atol=2e-4)


def test_top_p_reaches_past_the_first_candidates_in_a_flat_distribution() -> None:
    flat = torch.zeros(5000)
    assert len({draw(flat, u, top_p=0.5)[0] for u in np.linspace(0, 0.999, 2000)}) > 1500


def test_of_equals_the_first_in_the_vocabulary_are_kept() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.2, 0.2]).log()
    assert {draw(logits, u, top_k=4)[0] for u in np.linspace(0, 0.999, 50)} == {1, 2, 3, 4}
    assert {draw(logits, u, top_p=0.6)[0] for u in np.linspace(0, 0.999, 50)} == {1, 2, 3}


def test_the_likeliest_are_told_in_order_of_the_vocabulary_and_of_equals_the_first() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.2, 0.2])
    assert [likeliest(logits, count).tolist() for count in (1, 2, 3, 4, 6)] == [
        [1],
        [1, 3],
        [1, 2, 3],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


def test_several_draws_from_a_row_are_each_as_if_alone() -> None:
    probs = torch.softmax(random_logits(rows=3), dim=-1)
    uniforms_MK = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = inverse_cdf(probs, uniforms_MK)
    for k in range(7):
        assert torch.equal(inverse_cdf(probs, uniforms_MK[:, k : k + 1])[:, 0], together[:, k])


def test_top_p_counts_within_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    seen = {draw(logits, u, top_k=2, top_p=0.5)[0] for u in np.linspace(0, 0.999, 50)}
    assert seen == {0}  # 0.4 of 0.7 already reaches a half


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((300,), -torch.inf)
    logits[[7, 150]] = 0.0
    assert {draw(logits, u)[0] for u in (0.0, 0.25, 0.4999, 0.5, 0.75, np.nextafter(1.0, 0.0))} == {7, 150}


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    logits = random_logits(rows=8, vocab_size=49_152)
    rules = [(1.0, -1, 1.0), (0.7, -1, 1.0), (1.0, 20, 1.0), (1.0, -1, 0.8), (0.0, -1, 1.0), (1.3, 9, 0.5)]
    draws = [Draw(*rules[n % len(rules)], uniform(3, n, 0)) for n in range(8)]
    tokens, logprobs = draw_tokens(logits, draws)
    for first, last in ((0, 1), (0, 3), (2, 5), (7, 8)):
        assert draw_tokens(logits[first:last], draws[first:last]) == (tokens[first:last], logprobs[first:last])


def test_a_broken_row_gets_a_nan_and_leaves_the_others_alone() -> None:
    logits = random_logits(rows=4)
    draws = [Draw(1.0, -1, 1.0, 0.5), Draw(0.0, -1, 1.0, 0.5), Draw(1.0, 5, 0.5, 0.5), Draw(1.0, -1, 1.0, 0.5)]
    tokens, logprobs = draw_tokens(logits, draws)
    for n in range(3):
        broken = logits.clone()
        broken[n, 17] = torch.nan
        other_tokens, other_logprobs = draw_tokens(broken, draws)
        assert np.isnan(other_logprobs[n])
        assert other_tokens[3] == tokens[3]
        assert other_logprobs[3] == logprobs[3]


def test_an_exact_logit_replaces_the_rounded_one_in_the_logprob() -> None:
    exact = random_logits(rows=3)
    draws = [Draw(0.8, -1, 1.0, u) for u in (0.1, 0.5, 0.9)]
    rounded = exact.bfloat16().float()
    tokens, logprobs = draw_tokens(rounded, draws, lambda tokens_N: exact[torch.arange(3), tokens_N])
    for n, token in enumerate(tokens):
        mended = rounded[n].clone()
        mended[token] = exact[n, token]
        assert logprobs[n] == pytest.approx(float(torch.log_softmax(mended / 0.8, -1)[token]), abs=1e-6)


def test_a_uniform_depends_on_seed_index_and_position_and_on_each() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    values = [uniform(seed, index, position) for seed in (0, 1, -1, 2**64) for index in (0, 1) for position in (0, 1)]
    assert len(set(values)) == 12  # seed 2 ** 64 is seed 0: 64 bits count
    assert all(0 <= value < 1 for value in values)


def test_uniforms_are_the_same_however_many_are_drawn_at_once() -> None:
    ahead = uniforms(3, 1, 100, 40)
    assert ahead[:7] == uniforms(3, 1, 100, 7)
    assert [uniform(3, 1, 100 + n) for n in range(40)] == ahead


def test_the_numbers_of_alternatives_are_those_of_no_sample() -> None:
    numbers = alternative_uniforms(3, 100, 5, 4)
    assert numbers.shape == (5, 4)
    np.testing.assert_array_equal(alternative_uniforms(3, 102, 3, 2), numbers[2:, :2])
    of_samples = {uniform(3, index, 100 + n) for index in range(4) for n in range(5)}
    assert of_samples.isdisjoint(numbers.ravel().tolist())
    assert len(set(numbers.ravel().tolist())) == 20


def test_uniforms_are_uniform() -> None:
    values = np.sort([uniform(5, index, position) for index in range(10) for position in range(200)])
    assert np.abs(values - np.linspace(0, 1, len(values))).max() < 0.04  # Kolmogorov-Smirnov, far beyond 1 %


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(top_k=0), "top_k"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.5), "top_p"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(stop=("a", "")), "stop"),
    ],
)
def test_params_that_cannot_be_honoured_are_named(params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^sampling_params\.{field}: got"):
        check_params(params)


# --- stop conditions --------------------------------------------------------------------------------------------------


def stops_at(stop: tuple[str, ...] | tuple[int, ...] | None, tokens: list[int]) -> int | None:
    """After how many tokens the rule stops."""
    rule = StopRule(stop, (2,), tiny_tokenizer().backend_tokenizer, prompt_tokens=(5, 6))
    return next((n for n in range(1, len(tokens) + 1) if rule.is_reached(tokens[:n])), None)


def encoded(text: str) -> list[int]:
    tokens: list[int] = tiny_tokenizer().backend_tokenizer.encode(text).ids
    return tokens


def test_none_stops_at_the_models_own_end_of_sequence() -> None:
    assert stops_at(None, [9, 8, 2, 7]) == 3


def test_an_empty_tuple_stops_nowhere() -> None:
    assert stops_at((), [9, 8, 2, 7]) is None


def test_token_ids_replace_the_end_of_sequence() -> None:
    assert stops_at((8, 70), [9, 2, 70, 8]) == 3


def test_strings_replace_the_end_of_sequence() -> None:
    assert stops_at(("zzz",), [9, 2, 7]) is None


@pytest.mark.parametrize("stop", ["score", "core and se", " years ago", "\n\n", "né", "日", "👍🏽", "<|im_end|>"])
def test_a_string_stops_with_the_token_that_completes_it(stop: str) -> None:
    text = "Four score and seven years ago, née 日本 👍🏽.\n\nmore<|im_end|>more"
    tokens = encoded(text)
    count = stops_at((stop,), tokens)
    assert count is not None
    decode = tiny_tokenizer().backend_tokenizer.decode
    assert stop in decode(tokens[:count], skip_special_tokens=False)
    assert stop not in decode(tokens[: count - 1], skip_special_tokens=False)


def test_a_string_that_straddles_prompt_and_answer_does_not_stop() -> None:
    prompt, answer = encoded("Call me"), encoded(" Ishmael")
    rule = StopRule(("me Ish",), (2,), tiny_tokenizer().backend_tokenizer, prompt)
    assert not any(rule.is_reached(answer[: n + 1]) for n in range(len(answer)))


def test_half_a_character_is_not_a_stop() -> None:
    tokens = encoded("日")
    assert len(tokens) == 3
    assert stops_at(("日",), tokens) == 3
    assert stops_at(("本",), tokens) is None
