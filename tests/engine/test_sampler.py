"""The sampler against the trainer, transformers and peft; and each request against itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import DataObject, booleans, data, integers, none, sampled_from
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.engine.reference import (
    CPU,
    PeftReference,
    random_adapter_state,
    smollm2_path,
    smollm2_transformers,
    smollm2_weights,
)
from tests.models.operators import COMPILED, EAGER, each_ops, every_ops
from tests.models.tiny import TINY_KINDS, VOCAB_SIZE, TinyKind, make_tiny_model, tiny_tokenizer
from tuft.engine.base import EngineSettings, RunLoss, Sample
from tuft.engine.sampler import Sampler
from tuft.engine.trainer import Trainer
from tuft.errors import EngineError, InvalidInput, TuftError, UserError
from tuft.models.decoder import Decoder, Precision
from tuft.models.load import load_weights
from tuft.models.lora import Adapter
from tuft.models.ops import Ops
from tuft.models.tokenizer import load_tokenizer, write_tokenizer_files
from tuft.types import (
    Datum,
    LoraSpec,
    LossResult,
    PromptScoring,
    SampledSequence,
    SampleResult,
    SampleSpec,
    SamplingParams,
)

each_precision = pytest.mark.parametrize("precision", ["float32", "bf16"])

TOLERANCE = 1e-4
SPEC = LoraSpec(rank=4, seed=1)
ENDLESS = SamplingParams(max_tokens=24, stop=(), seed=7)


@cache
def tiny_directory(kind: TinyKind) -> Path:
    return make_tiny_model(kind, Path(mkdtemp()) / kind)


class CountedDecoder(Decoder):
    """Counts the rows that it computes."""

    num_rows = 0

    def hidden(self, tokens_T: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.num_rows += len(tokens_T)
        return super().hidden(tokens_T, *args, **options)


@cache
def tiny_decoder(kind: TinyKind = "qwen3", precision: Precision = "float32", ops: Ops = EAGER) -> CountedDecoder:
    return CountedDecoder(load_weights(str(tiny_directory(kind))), precision, CPU, ops)


def make_adapter(decoder: Decoder, seed: int = 0, size: float = 0.05) -> Adapter:
    state = random_adapter_state(decoder.config, SPEC, seed, size)
    return Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=False)


def make_sampler(decoder: Decoder, **settings: int) -> Sampler:
    return Sampler(decoder, tiny_tokenizer().backend_tokenizer, EngineSettings(**settings))  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist())


def sample_of(
    prompt: Sequence[int],
    params: SamplingParams = ENDLESS,
    num_samples: int = 1,
    topk_logprobs: int = 0,
    adapter_id: str | None = None,
    cache_scope: str = "",
    **scoring: Any,
) -> Sample:
    spec = SampleSpec(tuple(prompt), params, num_samples, topk_logprobs, PromptScoring(**scoring))
    return Sample("tiny", adapter_id, spec, cache_scope)


Wanted = tuple[Sample, Adapter | None]


def run(sampler: Sampler, wanted: Sequence[Wanted], steps_between: int = 0) -> list[SampleResult | TuftError]:
    """All outcomes, in order; each request arrives ``steps_between`` steps after the one before."""
    outcomes: dict[Any, SampleResult | TuftError] = {}
    for key, (command, adapter) in enumerate(wanted):
        sampler.add(key, command, adapter)
        for _ in range(steps_between):
            outcomes.update(sampler.step())
    while sampler.active:
        outcomes.update(sampler.step())
    assert sampler.step() == []
    assert sorted(outcomes) == list(range(len(wanted)))
    return [outcomes[key] for key in range(len(wanted))]


def run_one(decoder: Decoder, command: Sample, adapter: Adapter | None = None, **settings: int) -> SampleResult:
    (outcome,) = run(make_sampler(decoder, **settings), [(command, adapter)])
    assert isinstance(outcome, SampleResult), outcome
    return outcome


def assert_same(actual: SampleResult | TuftError, expected: SampleResult | TuftError) -> None:
    """To the last bit."""
    assert isinstance(actual, SampleResult), actual
    assert isinstance(expected, SampleResult), expected
    for mine, theirs in zip(actual.sequences, expected.sequences, strict=True):
        np.testing.assert_array_equal(mine.tokens_N, theirs.tokens_N)
        np.testing.assert_array_equal(mine.logprobs_N, theirs.logprobs_N)
        assert mine.stop_reason == theirs.stop_reason
        assert_same_arrays(mine.topk, theirs.topk)
    np.testing.assert_array_equal(actual.prompt_logprobs_P, expected.prompt_logprobs_P)
    for name in ("topk_prompt", "target_prompt_logprobs", "prompt_alternatives"):
        assert_same_arrays(getattr(actual, name), getattr(expected, name))


def assert_same_arrays(actual: object, expected: object) -> None:
    assert type(actual) is type(expected)
    for name in getattr(expected, "__slots__", ()):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def trainer_logprobs(
    decoder: Decoder, tokens: Sequence[int], adapter: Adapter | None, targets_T: np.ndarray | None = None
) -> np.ndarray:
    """The trainer's forward logprobs of ``targets_T``, or of the tokens themselves, behind ``tokens[:-1]``."""
    if adapter is None:
        adapter = make_adapter(decoder, size=0.0)  # B is zero
    tokens_T = np.asarray(tokens)
    datum = Datum(tokens_T[:-1], {"target_tokens": tokens_T[1:] if targets_T is None else targets_T})
    operation = RunLoss("a", (datum,), "cross_entropy", backward=False)
    ((_, result),) = Trainer(decoder, 2048).run([operation], {"a": adapter})
    assert isinstance(result, LossResult), result
    return result.logprobs[0]


def distance_to_trainer(decoder: Decoder, command: Sample, adapter: Adapter | None, **settings: int) -> np.ndarray:
    """Absolute differences of sampled and prompt logprobs to the trainer's on the same tokens."""
    prompt = command.spec.prompt_tokens
    scored = replace(command, spec=replace(command.spec, scoring=PromptScoring(logprobs=True)))
    result = run_one(decoder, scored, adapter, **settings)
    num_prompt = len(prompt)
    found = []
    for sequence in result.sequences:
        expected = trainer_logprobs(decoder, [*prompt, *sequence.tokens_N.tolist()], adapter)
        found.append(np.abs(sequence.logprobs_N - expected[num_prompt - 1 :]))
        assert result.prompt_logprobs_P is not None
        assert np.isnan(result.prompt_logprobs_P[0])
        found.append(np.abs(result.prompt_logprobs_P[1:] - expected[: num_prompt - 1]))
    return np.concatenate(found)


# --- the sampler equals the trainer -----------------------------------------------------------------------------------


@every_ops
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_logprobs_equal_the_trainers_in_float32(kind: TinyKind, with_adapter: bool, num_samples: int, ops: Ops) -> None:
    decoder = tiny_decoder(kind, ops=ops)
    adapter = make_adapter(decoder) if with_adapter else None
    command = sample_of(prompt_of(19), num_samples=num_samples)
    assert distance_to_trainer(decoder, command, adapter).max() < TOLERANCE


@every_ops
def test_logprobs_of_a_prompt_computed_in_chunks_equal_the_trainers(ops: Ops) -> None:
    decoder = tiny_decoder(ops=ops)
    command = sample_of(prompt_of(300), num_samples=2)
    assert distance_to_trainer(decoder, command, make_adapter(decoder), micro_batch_tokens=256).max() < TOLERANCE


@every_ops
def test_logprobs_are_near_the_trainers_in_bf16(ops: Ops) -> None:
    decoder = tiny_decoder(precision="bf16", ops=ops)
    distance = distance_to_trainer(decoder, sample_of(prompt_of(40), num_samples=4), make_adapter(decoder))
    assert distance.mean() < 0.01
    assert distance.max() < 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen3"])
def test_greedy_sampling_equals_transformers(kind: TinyKind) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_directory(kind), dtype=torch.float32)
    for seed, length in ((0, 1), (1, 9), (2, 40)):
        prompt = prompt_of(length, seed)
        result = run_one(tiny_decoder(kind), sample_of(prompt, SamplingParams(20, temperature=0.0, stop=())))
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert result.sequences[0].tokens_N.tolist() == expected[0, length:].tolist()


# --- alone or among others --------------------------------------------------------------------------------------------


@each_ops
@each_precision
@pytest.mark.parametrize(("num_others", "steps_between"), [(1, 0), (3, 3), (7, 0), (7, 3)])
def test_a_seeded_sample_has_the_same_bits_beside_others(
    precision: Precision, num_others: int, steps_between: int, ops: Ops
) -> None:
    decoder = tiny_decoder(precision=precision, ops=ops)
    adapters = [None, *(make_adapter(decoder, seed) for seed in range(3))]
    wanted: list[Wanted] = [
        (sample_of(prompt_of(17), num_samples=2, topk_logprobs=3, logprobs=True, topk=2), adapters[1])
    ]
    for n in range(num_others):
        params = replace(ENDLESS, seed=n, max_tokens=3 + 5 * n, temperature=0.8, top_k=-1 if n % 2 else 20)
        wanted.append((sample_of(prompt_of(2 + 11 * n, n), params, 1 + n % 3), adapters[n % 4]))
    alone = [run_one(decoder, command, adapter) for command, adapter in wanted]
    for actual, expected in zip(run(make_sampler(decoder), wanted, steps_between), alone, strict=True):
        assert_same(actual, expected)
    reversed_outcomes = run(make_sampler(decoder), wanted[::-1], steps_between)
    assert_same(reversed_outcomes[-1], alone[0])


@each_precision
@pytest.mark.parametrize("settings", [{"max_decode_rows": 1}, {"max_decode_rows": 3}, {"kv_cache_tokens": 256}])
def test_a_seeded_sample_has_the_same_bits_when_room_is_short(precision: Precision, settings: dict[str, int]) -> None:
    decoder = tiny_decoder(precision=precision)
    wanted: list[Wanted] = [
        (sample_of(prompt_of(30 + n, n), num_samples=4, params=replace(ENDLESS, seed=n)), None) for n in range(4)
    ]
    roomy = run(make_sampler(decoder), wanted)
    for actual, expected in zip(run(make_sampler(decoder, **settings), wanted), roomy, strict=True):
        assert_same(actual, expected)


def test_a_prompt_cut_into_chunks_has_the_same_bits_beside_others() -> None:
    decoder = tiny_decoder()
    wanted: list[Wanted] = [(sample_of(prompt_of(length, length), logprobs=True), None) for length in (300, 5, 130, 64)]
    alone = [run_one(decoder, command, micro_batch_tokens=256) for command, _ in wanted]
    for actual, expected in zip(run(make_sampler(decoder, micro_batch_tokens=256), wanted), alone, strict=True):
        assert_same(actual, expected)


def test_samples_of_one_seed_differ_by_index_and_not_by_how_many_there_are() -> None:
    decoder = tiny_decoder()
    four, two = (run_one(decoder, sample_of(prompt_of(9), num_samples=count)) for count in (4, 2))
    assert len({tuple(sequence.tokens_N.tolist()) for sequence in four.sequences}) == 4
    assert_same(SampleResult(four.sequences[:2]), two)


def test_without_a_seed_samples_differ() -> None:
    command = sample_of(prompt_of(9), replace(ENDLESS, seed=None))
    first, second = (run_one(tiny_decoder(), command).sequences[0] for _ in range(2))
    assert first.tokens_N.tolist() != second.tokens_N.tolist()


def test_prompts_go_on_while_others_decode() -> None:
    """A long prompt takes several steps, and a sequence that decodes gets a token in each."""
    sampler = make_sampler(tiny_decoder())
    sampler.add("short", sample_of(prompt_of(3), replace(ENDLESS, max_tokens=4)), None)
    sampler.step()
    sampler.add("long", sample_of(prompt_of(500), replace(ENDLESS, max_tokens=1)), None)
    order = []
    while sampler.active:
        order.append([key for key, _ in sampler.step()])
    assert order == [[], [], ["short"], ["long"]]


@each_ops
def test_a_request_has_the_same_bits_beside_31_others_of_other_adapters_and_lengths(ops: Ops) -> None:
    decoder = tiny_decoder(precision="bf16", ops=ops)
    adapters = [make_adapter(decoder, seed) for seed in range(31)]
    others: list[Wanted] = [
        (sample_of(prompt_of(3 + 9 * n, n), replace(ENDLESS, seed=n, max_tokens=2 + n)), adapters[n]) for n in range(31)
    ]
    mine: Wanted = (sample_of(prompt_of(140), ENDLESS), adapters[3])
    alone = run_one(decoder, *mine)
    for place in (0, 16, 31):
        outcomes = run(make_sampler(decoder), [*others[:place], mine, *others[place:]])
        assert_same(outcomes[place], alone)


# --- what is known already --------------------------------------------------------------------------------------------


def rows_of(decoder: CountedDecoder, sampler: Sampler, wanted: Sequence[Wanted]) -> tuple[int, list[Any]]:
    """How many rows these requests cost, and their outcomes."""
    before = decoder.num_rows
    outcomes = run(sampler, wanted)
    return decoder.num_rows - before, outcomes


@each_ops
@each_precision
@pytest.mark.parametrize("length", [5, 128, 300, 384])
def test_a_prompt_that_is_known_is_not_computed_again_and_gives_the_same_bits(
    length: int, precision: Precision, ops: Ops
) -> None:
    decoder = tiny_decoder(precision=precision, ops=ops)
    adapter, sampler = make_adapter(decoder), make_sampler(decoder)
    wanted: Wanted = (sample_of(prompt_of(length), num_samples=2), adapter)
    first_rows, (first,) = rows_of(decoder, sampler, [wanted])
    again_rows, (again,) = rows_of(decoder, sampler, [wanted])
    assert again_rows == first_rows - length
    assert_same(again, first)
    assert_same(first, run_one(decoder, *wanted))


@pytest.mark.parametrize("steps_between", [0, 1])
def test_requests_of_one_prompt_compute_it_once(steps_between: int) -> None:
    decoder = tiny_decoder()
    params = replace(ENDLESS, max_tokens=1)
    wanted: list[Wanted] = [(sample_of(prompt_of(200), replace(params, seed=n)), None) for n in range(5)]
    before = decoder.num_rows
    outcomes = run(make_sampler(decoder), wanted, steps_between)
    assert decoder.num_rows - before == 200
    for outcome, (command, _) in zip(outcomes, wanted, strict=True):
        assert_same(outcome, run_one(decoder, command))


def test_prompts_that_begin_alike_share_whole_chunks() -> None:
    decoder = tiny_decoder()
    params = replace(ENDLESS, max_tokens=1)
    common = prompt_of(300)
    wanted: list[Wanted] = [(sample_of((*common, *prompt_of(20, n)), params), None) for n in range(3)]
    num_rows, outcomes = rows_of(decoder, make_sampler(decoder), wanted)
    assert num_rows == 2 * 128 + 3 * (320 - 256)
    for outcome, (command, _) in zip(outcomes, wanted, strict=True):
        assert_same(outcome, run_one(decoder, command))


@pytest.mark.parametrize("other", ["scope", "adapter", "no adapter"])
def test_what_one_tenant_or_adapter_computed_serves_no_other(other: str) -> None:
    decoder = tiny_decoder()
    adapter, sampler = make_adapter(decoder), make_sampler(decoder)
    command = sample_of(prompt_of(200), replace(ENDLESS, max_tokens=1), cache_scope="mine")
    first_rows, _ = rows_of(decoder, sampler, [(command, adapter)])
    theirs = replace(command, cache_scope="theirs") if other == "scope" else command
    their_adapter = {"scope": adapter, "adapter": make_adapter(decoder, 1), "no adapter": None}[other]
    their_rows, (outcome,) = rows_of(decoder, sampler, [(theirs, their_adapter)])
    assert their_rows == first_rows == 200
    assert_same(outcome, run_one(decoder, theirs, their_adapter))


def test_prompt_logprobs_are_computed_although_the_prompt_is_known_and_make_it_known() -> None:
    decoder = tiny_decoder()
    sampler = make_sampler(decoder)
    params = replace(ENDLESS, max_tokens=1)
    plain, scored = (sample_of(prompt_of(150), params, logprobs=asked) for asked in (False, True))
    found = [rows_of(decoder, sampler, [(command, None)]) for command in (scored, plain, scored)]
    assert [num_rows for num_rows, _ in found] == [150, 0, 150]
    for (_, (outcome,)), command in zip(found, (scored, plain, scored), strict=True):
        assert_same(outcome, run_one(decoder, command))


def test_what_other_operators_computed_is_not_used() -> None:
    decoder = CountedDecoder(load_weights(str(tiny_directory("qwen3"))), "bf16", CPU)
    sampler, command = make_sampler(decoder), sample_of(prompt_of(150), replace(ENDLESS, max_tokens=6))
    run(sampler, [(command, None)])
    decoder.ops = COMPILED
    num_rows, (outcome,) = rows_of(decoder, sampler, [(command, None)])
    assert num_rows == 150  # the prompt again; steps of decoding do not come by here
    assert_same(outcome, run_one(decoder, command))


@settings(max_examples=25, deadline=None)
@given(data())
def test_no_page_is_lost_whatever_comes_and_goes(drawn: DataObject) -> None:
    """Random requests, few pages, any number of steps between them: all end, and every page can be taken again."""
    decoder = tiny_decoder(ops=COMPILED)
    adapters = [None, make_adapter(decoder), make_adapter(decoder, 1)]
    adapters[2].params_P[7] = torch.nan  # type: ignore[union-attr]
    sampler = make_sampler(decoder, kv_cache_tokens=drawn.draw(sampled_from([320, 500, 1000])), max_decode_rows=5)
    number = integers(0, 10**6)
    num_wanted = drawn.draw(integers(1, 6))
    outcomes = []
    for key in range(num_wanted):
        length = drawn.draw(sampled_from([1, 16, 100, 128, 140, 256, 290]))
        params = replace(ENDLESS, seed=drawn.draw(number), max_tokens=drawn.draw(integers(1, 24)), stop=(5, 6, 7))
        last_n = drawn.draw(none() | integers(1, length - 1)) if length > 1 else None
        command = sample_of(
            prompt_of(length, drawn.draw(integers(0, 1))),
            params,
            drawn.draw(integers(1, 7)),
            logprobs=last_n is not None or drawn.draw(booleans()),
            last_n=last_n,
            cache_scope=drawn.draw(sampled_from(["a", "b"])),
        )
        sampler.add(key, command, adapters[drawn.draw(integers(0, 2))])
        for _ in range(drawn.draw(integers(0, 8))):
            outcomes += sampler.step()
    while sampler.active:
        outcomes += sampler.step()
    assert sorted(key for key, _ in outcomes) == list(range(num_wanted))
    num_pages = sampler._pages.blank  # all but that one
    assert sampler._cache.num_takeable == num_pages
    assert len(set(sampler._cache.take(num_pages))) == num_pages


# --- how a sequence ends ----------------------------------------------------------------------------------------------


def test_a_sequence_ends_with_the_token_that_stops_it() -> None:
    free = run_one(tiny_decoder(), sample_of(prompt_of(9))).sequences[0].tokens_N.tolist()
    stop = free[5]
    (sequence,) = run_one(tiny_decoder(), sample_of(prompt_of(9), replace(ENDLESS, stop=(stop,)))).sequences
    assert sequence.tokens_N.tolist() == free[: free.index(stop) + 1]
    assert len(sequence.logprobs_N) == len(sequence.tokens_N)
    assert sequence.stop_reason == "stop"


def test_a_sequence_ends_once_its_text_contains_a_stop_string() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    free = run_one(tiny_decoder(), sample_of(prompt_of(9))).sequences[0].tokens_N.tolist()
    stop = tokenizer.decode(free[3:6], skip_special_tokens=False).strip("\ufffd")
    assert stop
    (sequence,) = run_one(tiny_decoder(), sample_of(prompt_of(9), replace(ENDLESS, stop=(stop,)))).sequences
    assert sequence.stop_reason == "stop"
    assert stop in tokenizer.decode(sequence.tokens_N.tolist(), skip_special_tokens=False)
    assert sequence.tokens_N.tolist() == free[: len(sequence.tokens_N)]
    assert len(sequence.tokens_N) <= 6


def test_samples_of_one_request_end_each_at_its_own_time() -> None:
    free = run_one(tiny_decoder(), sample_of(prompt_of(9), num_samples=6)).sequences
    stops = tuple({int(sequence.tokens_N[3 * n]) for n, sequence in enumerate(free[:5])})
    result = run_one(tiny_decoder(), sample_of(prompt_of(9), replace(ENDLESS, stop=stops), num_samples=6))
    for actual, whole in zip(result.sequences, free, strict=True):
        tokens = whole.tokens_N.tolist()
        length = next((n + 1 for n, token in enumerate(tokens) if token in stops), len(tokens))
        np.testing.assert_array_equal(actual.tokens_N, whole.tokens_N[:length])
        np.testing.assert_array_equal(actual.logprobs_N, whole.logprobs_N[:length])


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "expected"), [(500, None, 12), (500, 40, 12), (512, 3, 1), (500, 5, 5)]
)
def test_generation_ends_at_max_tokens_or_the_context_limit(
    num_prompt: int, max_tokens: int | None, expected: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens, stop=(), seed=1)
    (sequence,) = run_one(tiny_decoder(), sample_of(prompt_of(num_prompt), params)).sequences
    assert len(sequence.tokens_N) == expected
    assert sequence.stop_reason == "length"


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (sample_of(()), r"^prompt: got '0 tokens"),
        (sample_of(prompt_of(513)), r"^prompt: got '513 tokens with max_tokens 24'; must have 1 to 512 tokens"),
        (sample_of((5, VOCAB_SIZE)), rf"^prompt\[1\]: got {VOCAB_SIZE}; must be 0 to {VOCAB_SIZE - 1}"),
        (sample_of((-1,)), r"^prompt\[0\]: got -1"),
        (sample_of((5,), num_samples=0), r"^num_samples: got 0"),
        (sample_of((5,), topk=-1), r"^topk_prompt_logprobs: got -1"),
        (
            sample_of((5,), topk_logprobs=VOCAB_SIZE + 1),
            rf"^topk_sample_logprobs: got {VOCAB_SIZE + 1}; must be 0 to {VOCAB_SIZE}",
        ),
        (sample_of((5,), SamplingParams(temperature=-1.0)), r"^sampling_params.temperature: got -1"),
        (
            sample_of(prompt_of(300), SamplingParams(max_tokens=None)),
            r"max_tokens: got None; 300 prompt tokens and up to 212",
        ),
    ],
)
def test_a_request_that_can_never_be_honoured_is_refused(command: Sample, problem: str) -> None:
    sampler = make_sampler(tiny_decoder(), kv_cache_tokens=400)
    with pytest.raises(InvalidInput, match=problem):
        sampler.add("key", command, None)
    assert not sampler.active


@each_ops
@pytest.mark.parametrize("extreme", [{"top_k": 2**64 - 1}, {"top_k": 2**70}, {"top_p": 5e-324}, {"seed": 2**64 - 1}])
def test_extreme_parameters_of_one_request_leave_the_others_alone(extreme: dict[str, Any], ops: Ops) -> None:
    decoder, mine = tiny_decoder(precision="bf16", ops=ops), sample_of(prompt_of(9))
    theirs = sample_of(prompt_of(9, 1), replace(ENDLESS, **extreme))
    beside, other = run(make_sampler(decoder), [(mine, None), (theirs, None)])
    assert isinstance(other, SampleResult), other
    assert_same(beside, run_one(decoder, mine))


@every_ops
@each_precision
def test_a_nan_in_an_adapter_fails_its_own_request_alone(precision: Precision, ops: Ops) -> None:
    decoder = tiny_decoder(precision=precision, ops=ops)
    broken = make_adapter(decoder)
    broken.params_P[123] = torch.nan
    healthy = [(sample_of(prompt_of(5 + n, n), num_samples=2), make_adapter(decoder, n)) for n in range(3)]
    bad = (sample_of(prompt_of(8), num_samples=3, adapter_id="theirs"), broken)
    base = (sample_of(prompt_of(7)), None)
    first, failed, *others = run(make_sampler(decoder), [healthy[0], bad, healthy[1], base, healthy[2]])
    assert isinstance(failed, UserError)
    assert "'theirs'" in str(failed)
    expected = [run_one(decoder, *wanted) for wanted in (healthy[0], healthy[1], base, healthy[2])]
    for actual, alone in zip([first, *others], expected, strict=True):
        assert_same(actual, alone)


def test_a_step_that_breaks_fails_those_in_it_and_the_sampler_goes_on() -> None:
    decoder = tiny_decoder()
    sampler = make_sampler(decoder, max_decode_rows=1)
    misfit = make_adapter(tiny_decoder("llama-tied"))  # shapes of another model: the product raises
    outcomes = run(sampler, [(sample_of(prompt_of(5)), misfit), (sample_of(prompt_of(5)), None)])
    assert isinstance(outcomes[0], EngineError)
    assert_same(outcomes[1], run_one(decoder, sample_of(prompt_of(5))))


# --- the embedded model -----------------------------------------------------------------------------------------------

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a little")


@cache
def smollm2_tokenizer() -> Tokenizer:
    directory = Path(mkdtemp()) / "tokenizer"
    write_tokenizer_files(str(smollm2_path()), directory)
    return load_tokenizer(directory)


@cache
def smollm2_decoder(precision: Precision, ops: Ops = EAGER) -> Decoder:
    return Decoder(smollm2_weights(), precision, CPU, ops)


def smollm2_sample(prompt: str, params: SamplingParams, adapter: Adapter | None = None) -> SampledSequence:
    sampler = Sampler(smollm2_decoder("float32"), smollm2_tokenizer(), EngineSettings())
    (outcome,) = run(sampler, [(sample_of(smollm2_tokenizer().encode(prompt).ids, params), adapter)])
    assert isinstance(outcome, SampleResult), outcome
    return outcome.sequences[0]


@pytest.mark.slow
def test_greedy_sampling_of_smollm2_equals_transformers() -> None:
    model = smollm2_transformers()
    for prompt in PROMPTS:
        ids = smollm2_tokenizer().encode(prompt).ids
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=2, eos_token_id=2
        )
        sequence = smollm2_sample(prompt, SamplingParams(max_tokens=24, temperature=0.0))
        assert sequence.tokens_N.tolist() == expected[0, len(ids) :].tolist()


@pytest.mark.slow
def test_greedy_sampling_of_smollm2_with_an_adapter_equals_peft() -> None:
    decoder = smollm2_decoder("float32")
    state = random_adapter_state(decoder.config, LoraSpec(rank=8, seed=1), size=0.01)
    adapter = Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=False)
    model = PeftReference(smollm2_transformers(), state).model
    for prompt in PROMPTS[:2]:
        ids = smollm2_tokenizer().encode(prompt).ids
        expected = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=2, eos_token_id=2
        )
        sequence = smollm2_sample(prompt, SamplingParams(max_tokens=16, temperature=0.0), adapter)
        assert sequence.tokens_N.tolist() == expected[0, len(ids) :].tolist()


@pytest.mark.slow
@every_ops
@pytest.mark.parametrize(("precision", "mean", "largest"), [("float32", 1e-5, 1e-4), ("bf16", 0.03, 0.5)])
def test_smollm2_logprobs_are_near_the_trainers(precision: Precision, mean: float, largest: float, ops: Ops) -> None:
    decoder = smollm2_decoder(precision, ops)
    command = sample_of(smollm2_tokenizer().encode(PROMPTS[2]).ids, replace(ENDLESS, max_tokens=32), num_samples=4)
    state = random_adapter_state(decoder.config, LoraSpec(rank=8, seed=1), size=0.01)
    adapter = Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=False)
    distance = distance_to_trainer(decoder, command, adapter)
    print(f"{precision}: mean {distance.mean():.2e}, max {distance.max():.2e}")
    assert distance.mean() < mean
    assert distance.max() < largest


@pytest.mark.slow
@each_ops
@each_precision
def test_a_seeded_smollm2_sample_has_the_same_bits_beside_others(precision: Precision, ops: Ops) -> None:
    decoder = smollm2_decoder(precision, ops)
    shapes = decoder.config.linear_shapes()
    states = [random_adapter_state(decoder.config, LoraSpec(rank=8, seed=1), seed, 0.01) for seed in range(2)]
    adapters = [None, *(Adapter.from_state(shapes, state, CPU, trainable=False) for state in states)]
    params = replace(ENDLESS, max_tokens=8)
    wanted: list[Wanted] = [
        (sample_of(smollm2_tokenizer().encode(PROMPTS[n % 3]).ids, replace(params, seed=n), 1 + n % 2), adapters[n % 3])
        for n in range(8)
    ]
    alone = [run_one(decoder, *wanted[n]) for n in range(3)]
    for num_rows in (2, 4, 8):
        outcomes = run(make_sampler(decoder), wanted[:num_rows], steps_between=1)
        for actual, expected in zip(outcomes, alone, strict=False):
            assert_same(actual, expected)
