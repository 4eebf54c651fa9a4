"""What is asked about prompts: against the trainer and transformers; together or alone; known beginnings or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.test_sampler import (
    ENDLESS,
    TOLERANCE,
    Wanted,
    assert_same,
    assert_same_arrays,
    each_precision,
    make_adapter,
    make_sampler,
    prompt_of,
    rows_of,
    run,
    run_one,
    sample_of,
    tiny_decoder,
    tiny_directory,
    trainer_logprobs,
)
from tests.models.operators import each_ops, every_ops
from tests.models.tiny import VOCAB_SIZE
from tuft.models.decoder import Precision
from tuft.models.ops import Ops
from tuft.types import Float32Array, Int64Array, Matrix, SampleResult, TokenLogprobs

ONE = replace(ENDLESS, max_tokens=1)


def targets_of(num_prompt: int, width: int = 5, seed: int = 0) -> Matrix:
    """A third of the cells ask for nothing."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB_SIZE, (num_prompt - 1, width))
    ids[random.random(ids.shape) < 1 / 3] = -1
    return Matrix(ids.ravel(), (num_prompt - 1, width))


def sparse(dense: Matrix) -> Matrix:
    """The cells of ``dense`` that ask for something."""
    ids = dense.values_M.reshape(dense.shape)
    rows, columns = np.nonzero(ids >= 0)
    return Matrix(ids[rows, columns], dense.shape, np.searchsorted(rows, np.arange(len(ids) + 1)), columns)


def targets_at(row: int, num_rows: int = 299) -> Matrix:
    """One id in all, behind a cell that asks for nothing."""
    crow = np.where(np.arange(num_rows + 1) > row, 2, 0)
    return Matrix(np.array([-1, 7]), (num_rows, 4), crow, np.array([1, 3]))


Found = tuple[Float32Array, TokenLogprobs, Matrix, TokenLogprobs]


def everything(result: SampleResult) -> Found:
    """The four things that can be asked about a prompt."""
    assert result.prompt_logprobs_P is not None
    assert result.topk_prompt is not None
    assert result.target_prompt_logprobs is not None
    assert result.prompt_alternatives is not None
    return result.prompt_logprobs_P, result.topk_prompt, result.target_prompt_logprobs, result.prompt_alternatives


# --- what it says -----------------------------------------------------------------------------------------------------


@every_ops
@each_precision
@pytest.mark.parametrize("with_adapter", [False, True])
def test_every_logprob_is_the_trainers(with_adapter: bool, precision: Precision, ops: Ops) -> None:
    decoder, prompt = tiny_decoder(precision=precision, ops=ops), prompt_of(140)
    adapter = make_adapter(decoder) if with_adapter else None
    targets = targets_of(140)
    command = sample_of(prompt, ONE, logprobs=True, topk=4, targets=targets, num_alternatives=3)
    own_P, topk, of_targets, alternatives = everything(run_one(decoder, command, adapter))

    def assert_trainers(ids_RK: Int64Array, logprobs_RK: Float32Array) -> None:
        for ids_R, logprobs_R in zip(ids_RK.T, logprobs_RK.T, strict=True):
            expected_R = trainer_logprobs(decoder, prompt, adapter, np.maximum(ids_R, 0))
            tolerance = TOLERANCE if precision == "float32" else 0.1
            np.testing.assert_allclose(logprobs_R, np.where(ids_R < 0, 0, expected_R), atol=tolerance, rtol=0)

    assert_trainers(np.asarray(prompt)[1:, None], own_P[1:, None])
    assert_trainers(topk.ids_LK[1:], topk.logprobs_LK[1:])
    assert_trainers(targets.values_M.reshape(targets.shape), of_targets.values_M.reshape(targets.shape))
    assert_trainers(alternatives.ids_LK, alternatives.logprobs_LK)
    assert np.isnan(own_P[0])
    assert topk.ids_LK[0].tolist() == [0] * 4
    assert topk.logprobs_LK[0].tolist() == [-99999.0] * 4


@every_ops
@each_precision
def test_a_token_has_one_logprob_wherever_it_stands(precision: Precision, ops: Ops) -> None:
    decoder, prompt = tiny_decoder(precision=precision, ops=ops), prompt_of(60)
    targets = Matrix(np.asarray(prompt)[1:], (59, 1))
    command = sample_of(prompt, ONE, logprobs=True, topk=VOCAB_SIZE, targets=targets, num_alternatives=5)
    own_P, topk, of_targets, alternatives = everything(run_one(decoder, command))
    np.testing.assert_array_equal(of_targets.values_M, own_P[1:])
    of_all_RV = np.empty((59, VOCAB_SIZE), dtype=np.float32)
    np.put_along_axis(of_all_RV, topk.ids_LK[1:], topk.logprobs_LK[1:], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(of_all_RV, np.asarray(prompt)[1:, None], 1)[:, 0], own_P[1:])
    np.testing.assert_array_equal(np.take_along_axis(of_all_RV, alternatives.ids_LK, 1), alternatives.logprobs_LK)
    assert (np.diff(topk.logprobs_LK[1:], axis=1) <= 0).all()
    np.testing.assert_allclose(
        np.exp(of_all_RV.astype(np.float64)).sum(1), 1, atol=1e-5 if precision == "float32" else 0.02
    )


def test_the_top_of_each_place_are_the_likeliest_tokens() -> None:
    prompt = prompt_of(90)
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("qwen3"), dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1).topk(5)
    result = run_one(tiny_decoder(), sample_of(prompt, topk=5), micro_batch_tokens=256)
    assert result.prompt_logprobs_P is None
    assert result.topk_prompt is not None
    np.testing.assert_array_equal(result.topk_prompt.ids_LK[1:], expected.indices[:-1].numpy())
    np.testing.assert_allclose(result.topk_prompt.logprobs_LK[1:], expected.values[:-1].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_dense_and_sparse_targets_get_the_same_in_their_own_layout(precision: Precision) -> None:
    decoder, dense = tiny_decoder(precision=precision), targets_of(150)
    listed = sparse(dense)
    found = []
    for targets in (dense, listed):
        result = run_one(decoder, sample_of(prompt_of(150), ONE, targets=targets))
        assert result.prompt_logprobs_P is None
        assert result.target_prompt_logprobs is not None
        assert_same_arrays(replace(result.target_prompt_logprobs, values_M=targets.values_M), targets)
        found.append(result.target_prompt_logprobs.values_M)
    is_wanted = dense.values_M >= 0
    np.testing.assert_array_equal(found[0][is_wanted], found[1])
    assert (found[0][~is_wanted] == 0).all()
    assert (found[1] < 0).all()


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    command = sample_of((7,), ONE, logprobs=True, topk=2, num_alternatives=3)
    result = run_one(tiny_decoder(), command)
    assert result.prompt_logprobs_P is not None
    assert np.isnan(result.prompt_logprobs_P).tolist() == [True]
    assert result.topk_prompt is not None
    assert result.topk_prompt.ids_LK.tolist() == [[0, 0]]
    assert result.prompt_alternatives is not None
    assert result.prompt_alternatives.ids_LK.shape == (0, 3)


# --- alternatives -----------------------------------------------------------------------------------------------------


def alternatives_of(count: int, prompt: tuple[int, ...] = prompt_of(9), **params: Any) -> TokenLogprobs:
    command = sample_of(prompt, replace(ONE, **params), num_alternatives=count)
    found = run_one(tiny_decoder(), command).prompt_alternatives
    assert found is not None
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_alternatives_are_drawn_as_often_as_their_probability_at_the_temperature_says(temperature: float) -> None:
    prompt = prompt_of(9)
    found = alternatives_of(1024, prompt, temperature=temperature, top_k=1, top_p=0.1)  # these two are of samples
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("qwen3"), dtype=torch.float32)
    with torch.no_grad():
        logits_RV = model(torch.tensor([prompt])).logits[0, :-1].double()
    expected_RV = torch.softmax(logits_RV / temperature, -1).numpy()
    for ids_K, expected_V in zip(found.ids_LK, expected_RV, strict=True):
        order = np.argsort(-expected_V)
        difference = (np.bincount(ids_K, minlength=VOCAB_SIZE) / 1024 - expected_V)[order].cumsum()
        assert np.abs(difference).max() < 0.065  # Kolmogorov-Smirnov: one row in 3000 has more
    logprobs_RV = torch.log_softmax(logits_RV, -1).numpy()
    np.testing.assert_allclose(found.logprobs_LK, np.take_along_axis(logprobs_RV, found.ids_LK, 1), atol=TOLERANCE)


def test_at_temperature_zero_every_alternative_is_the_likeliest_token() -> None:
    found = alternatives_of(3, temperature=0.0)
    topk = run_one(tiny_decoder(), sample_of(prompt_of(9), ONE, topk=1)).topk_prompt
    assert topk is not None
    np.testing.assert_array_equal(found.ids_LK, topk.ids_LK[1:].repeat(3, axis=1))
    np.testing.assert_array_equal(found.logprobs_LK, topk.logprobs_LK[1:].repeat(3, axis=1))


def test_alternatives_depend_on_seed_and_place_alone() -> None:
    few, many = alternatives_of(3), alternatives_of(100)
    np.testing.assert_array_equal(few.ids_LK, many.ids_LK[:, :3])
    assert (alternatives_of(100, seed=8).ids_LK != many.ids_LK).mean() > 0.5
    assert (many.ids_LK[:, :50] != many.ids_LK[:, 50:]).mean() > 0.5
    longer = alternatives_of(3, (*prompt_of(9), 5, 6))
    np.testing.assert_array_equal(longer.ids_LK[:8], few.ids_LK)
    assert (alternatives_of(100, seed=None).ids_LK != many.ids_LK).mean() > 0.5


# --- in whatever company ----------------------------------------------------------------------------------------------


def test_what_is_asked_together_is_what_is_asked_alone() -> None:
    decoder, prompt, adapter = tiny_decoder(), prompt_of(200), make_adapter(tiny_decoder())
    asked: dict[str, Any] = {"logprobs": True, "topk": 3, "targets": targets_of(200), "num_alternatives": 2}
    params = replace(ENDLESS, max_tokens=4)
    together = run_one(decoder, sample_of(prompt, params, 2, 3, **asked), adapter)
    plain = run_one(decoder, sample_of(prompt, params, 2), adapter)
    names = ("prompt_logprobs_P", "topk_prompt", "target_prompt_logprobs", "prompt_alternatives")
    for (option, value), name in zip(asked.items(), names, strict=True):
        alone = run_one(decoder, sample_of(prompt, params, 2, **{option: value}), adapter)
        assert [getattr(alone, other) is None for other in names] == [other != name for other in names]
        assert_same(alone, replace(plain, **{name: getattr(together, name)}))
    for mine, theirs in zip(together.sequences, plain.sequences, strict=True):
        np.testing.assert_array_equal(mine.tokens_N, theirs.tokens_N)
        np.testing.assert_array_equal(mine.logprobs_N, theirs.logprobs_N)


@each_ops
@each_precision
@pytest.mark.parametrize("steps_between", [0, 1])
def test_the_answers_have_the_same_bits_beside_others(steps_between: int, precision: Precision, ops: Ops) -> None:
    decoder = tiny_decoder(precision=precision, ops=ops)
    adapters = [None, make_adapter(decoder), make_adapter(decoder, 1)]
    options: list[dict[str, Any]] = [
        {"logprobs": True, "topk": 3, "targets": targets_of(150), "num_alternatives": 2},
        {"logprobs": True, "topk": 2, "last_n": 20, "targets": sparse(targets_of(151, 2, seed=1))},
        {"num_alternatives": 5},
        {"targets": targets_of(153, 1, seed=2)},
        {},
    ]
    wanted: list[Wanted] = [
        (sample_of(prompt_of(150 + n), replace(ENDLESS, seed=n, max_tokens=6), 2, n, **asked), adapters[n % 3])
        for n, asked in enumerate(options)
    ]
    alone = [run_one(decoder, *one) for one in wanted]
    for order in (wanted, wanted[::-1]):
        outcomes = run(make_sampler(decoder), order, steps_between)
        for actual, expected in zip(outcomes if order is wanted else outcomes[::-1], alone, strict=True):
            assert_same(actual, expected)


# --- what is known already --------------------------------------------------------------------------------------------


@each_ops
@each_precision
@pytest.mark.parametrize("last_n", [1, 20, 44, 45, 171, 172, 299])
def test_the_last_logprobs_are_those_of_all_and_what_precedes_them_is_read(
    last_n: int, precision: Precision, ops: Ops
) -> None:
    decoder, prompt = tiny_decoder(precision=precision, ops=ops), prompt_of(300)
    adapter, sampler = make_adapter(decoder), make_sampler(decoder)
    whole = sample_of(prompt, ONE, logprobs=True, topk=2)
    part = sample_of(prompt, ONE, logprobs=True, topk=2, last_n=last_n)
    whole_rows, (of_whole,) = rows_of(decoder, sampler, [(whole, adapter)])
    part_rows, (of_part,) = rows_of(decoder, sampler, [(part, adapter)])
    first_row = 300 - 1 - last_n
    num_known = first_row // 128 * 128
    assert (whole_rows, part_rows) == (300, 300 - num_known)
    assert (of_whole.prompt_cache_hit_tokens, of_part.prompt_cache_hit_tokens) == (0, num_known)
    assert_same(of_part, run_one(decoder, part, adapter))
    np.testing.assert_array_equal(of_part.prompt_logprobs_P[-last_n:], of_whole.prompt_logprobs_P[-last_n:])
    assert np.isnan(of_part.prompt_logprobs_P[:-last_n]).all()
    for name in ("ids_LK", "logprobs_LK"):
        mine, theirs = getattr(of_part.topk_prompt, name), getattr(of_whole.topk_prompt, name)
        np.testing.assert_array_equal(mine[-last_n:], theirs[-last_n:])
        assert (mine[:-last_n] == (0 if name == "ids_LK" else -99999.0)).all()


@pytest.mark.parametrize(
    ("asked", "num_hits"),
    [
        ({}, 300),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "last_n": 30}, 256),
        ({"logprobs": True, "last_n": 30, "num_alternatives": 1}, 0),
        ({"targets": targets_at(200)}, 128),
        ({"logprobs": True, "last_n": 30, "targets": targets_at(290)}, 256),
        ({"logprobs": True, "last_n": 30, "targets": targets_at(100)}, 0),
    ],
)
def test_tokens_of_the_prompt_that_were_known_are_counted_once(asked: dict[str, Any], num_hits: int) -> None:
    sampler = make_sampler(tiny_decoder())
    run(sampler, [(sample_of(prompt_of(300), ONE), None)])
    (result,) = run(sampler, [(sample_of(prompt_of(300), replace(ENDLESS, max_tokens=2), 3, **asked), None)])
    assert isinstance(result, SampleResult), result
    assert result.prompt_cache_hit_tokens == num_hits
