"""Every option of the newest SDK's SampleRequest, through the SDK, by what comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import TINY_MODEL, LiveServer

PROMPT = [5, 17, 80, 33, 150, 42, 7, 99, 12, 61, 200, 18]
NUM_ROWS = len(PROMPT) - 1
SAME = 1e-4
"""Of two ways to add up the same float32 numbers."""

Sample = Callable[..., types.SampleResponse]


@pytest.fixture(scope="module")
def sampler(tiny_server: LiveServer) -> tinker.SamplingClient:
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    return client.create_sampling_client(base_model=TINY_MODEL).result()


@pytest.fixture(scope="module")
def sample(sampler: tinker.SamplingClient) -> Sample:
    """``sample(num_samples, prompt, **options)``: those of ``SamplingParams`` and those of ``sample``."""

    def ask(num_samples: int = 1, prompt: list[int] = PROMPT, **options: Any) -> types.SampleResponse:
        params: dict[str, Any] = {"max_tokens": 4, "seed": 3, "stop": []}
        params |= {name: options.pop(name) for name in types.SamplingParams.model_fields if name in options}
        model_input = types.ModelInput.from_ints(prompt)
        return sampler.sample(model_input, num_samples, types.SamplingParams(**params), **options).result()

    return ask


LogprobsOf = Callable[[list[int]], np.ndarray]


@pytest.fixture(scope="module")
def logprobs_of(tiny_model: Path) -> LogprobsOf:
    """By transformers, ``[T, V]``: row i says how likely each token is behind token i."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def compute(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits_TV = model(torch.tensor([tokens])).logits[0]
        found: np.ndarray = torch.log_softmax(logits_TV / temperature, dim=-1).numpy()
        return found

    return compute


@pytest.fixture(scope="module")
def decode(tiny_model: Path) -> Callable[[list[int]], str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda tokens: str(tokenizer.decode(tokens))


def tokens_of(response: types.SampleResponse) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


# --- how is sampled ---------------------------------------------------------------------------------------------------


def test_num_samples_are_as_many_sequences_with_names_of_their_own(sample: Sample) -> None:
    response = sample(3)
    assert len({tuple(tokens) for tokens in tokens_of(response)}) == 3
    assert len({sequence.sequence_id for sequence in response.sequences}) == 3
    assert tokens_of(sample(2)) == tokens_of(response)[:2]


def test_a_prompt_in_several_chunks_is_one_prompt(sampler: tinker.SamplingClient, sample: Sample) -> None:
    chunks = [types.EncodedTextChunk(tokens=PROMPT[:5]), types.EncodedTextChunk(tokens=PROMPT[5:])]
    params = types.SamplingParams(max_tokens=4, seed=3, stop=[])
    response = sampler.sample(types.ModelInput(chunks=list(chunks)), 1, params).result()
    assert tokens_of(response) == tokens_of(sample())


@pytest.mark.parametrize(
    "chunk",
    [
        types.ImageChunk(data=b"png", format="png", expected_tokens=2),
        types.ImageAssetPointerChunk(location="tinker://a/b", format="png", expected_tokens=2),
        types.DmelChunk(dmel=b"\x00\x01\x02"),
    ],
)
def test_what_is_no_text_is_refused_by_name(sampler: tinker.SamplingClient, chunk: Any) -> None:
    model_input = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=PROMPT), chunk])
    with pytest.raises(tinker.BadRequestError, match=r"prompt.chunks\[1\].*the models served here read text only"):
        sampler.sample(model_input, 1, types.SamplingParams(max_tokens=1)).result()


def test_max_tokens_ends_a_sequence(sample: Sample) -> None:
    for count in (1, 7):
        (sequence,) = sample(max_tokens=count).sequences
        assert (len(sequence.tokens), sequence.stop_reason) == (count, "length")


def test_a_seed_gives_the_same_tokens_and_another_seed_others(sample: Sample) -> None:
    assert tokens_of(sample(2, seed=8)) == tokens_of(sample(2, seed=8))
    seeds = [3, 4, -1, 2**63 + 5, None, None]
    assert len({tuple(tokens_of(sample(seed=seed, max_tokens=8))[0]) for seed in seeds}) == len(seeds)


def test_temperature_scales_the_distribution_that_logprobs_are_of(sample: Sample, logprobs_of: Any) -> None:
    for temperature in (0.0, 0.6, 1.7):
        (sequence,) = sample(temperature=temperature, max_tokens=6).sequences
        logprobs_TV = logprobs_of([*PROMPT, *sequence.tokens], temperature or 1.0)[NUM_ROWS:-1]
        expected = logprobs_TV[range(6), sequence.tokens]
        assert sequence.logprobs == pytest.approx(expected, abs=SAME)
        if temperature == 0:
            assert sequence.tokens == logprobs_TV.argmax(axis=1).tolist()


def test_top_k_and_top_p_leave_the_likeliest(sample: Sample, logprobs_of: LogprobsOf) -> None:
    order = np.argsort(-logprobs_of(PROMPT)[-1])
    num_likely = int((np.exp(logprobs_of(PROMPT)[-1])[order].cumsum() < 0.5).sum()) + 1
    firsts = {
        name: {tokens[0] for tokens in tokens_of(sample(100, max_tokens=1, **{name: value}))}
        for name, value in (("top_k", 2), ("top_p", 0.5))
    }
    assert firsts["top_k"] == set(order[:2].tolist())
    assert len(firsts["top_p"]) > 1
    assert firsts["top_p"] <= set(order[:num_likely].tolist())


def test_stop_is_a_string_strings_tokens_or_nothing_at_all(sample: Sample, decode: Callable[[list[int]], str]) -> None:
    free = sample(max_tokens=40, seed=1, stop=[]).sequences[0]
    assert (len(free.tokens), free.stop_reason) == (40, "length")
    text = decode(free.tokens[5:8]).strip("\ufffd")  # it straddles tokens, and may begin within one
    for stop in (text, ["no such text", text]):
        (sequence,) = sample(max_tokens=40, seed=1, stop=stop).sequences
        assert sequence.stop_reason == "stop"
        assert sequence.tokens == free.tokens[: len(sequence.tokens)]
        assert text in decode(sequence.tokens)
        assert text not in decode(sequence.tokens[:-1])
    (sequence,) = sample(max_tokens=40, seed=1, stop=[383, free.tokens[9]]).sequences
    assert sequence.tokens == free.tokens[: free.tokens.index(free.tokens[9]) + 1]


def test_without_stop_the_models_own_end_stops(sample: Sample) -> None:
    ended = [sequence for sequence in sample(64, max_tokens=60, stop=None).sequences if sequence.stop_reason == "stop"]
    assert ended
    assert all(sequence.tokens.index(2) == len(sequence.tokens) - 1 for sequence in ended)
    going_on = sample(64, max_tokens=60, stop=[]).sequences
    assert all(sequence.stop_reason == "length" for sequence in going_on)
    assert any(2 in sequence.tokens for sequence in going_on)


@pytest.mark.calls("POST /api/v1/asample")
def test_a_base_model_or_saved_weights_are_sampled_without_a_session(tiny_server: LiveServer, sample: Sample) -> None:
    """Two fields that no SDK with sessions sends."""
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=2, seed=1).result()
    path = training.save_weights_for_sampler("without-a-session").result().path
    request = types.SampleRequest(
        prompt=types.ModelInput.from_ints(PROMPT),
        sampling_params=types.SamplingParams(max_tokens=4, seed=3, stop=[]),
    ).model_dump(mode="json")
    with httpx.Client(base_url=f"{tiny_server.url}/api/v1", headers={"X-API-Key": tiny_server.key}, timeout=60) as http:
        for named in ({"base_model": TINY_MODEL}, {"model_path": path}):
            answer = http.post("asample", json={**request, **named}).json()
            result = http.post("retrieve_future", json={"request_id": answer["request_id"]}).json()
            assert [result["sequences"][0]["tokens"]] == tokens_of(sample())  # new adapters change nothing
        refused = http.post("asample", json=request)
        assert (refused.status_code, refused.json()["detail"]) == (
            400,
            "base_model: got None; give base_model or model_path",
        )


# --- what is told beside the tokens -----------------------------------------------------------------------------------


def test_prompt_logprobs_are_those_of_the_trainer(
    sampler: tinker.SamplingClient, sample: Sample, logprobs_of: LogprobsOf
) -> None:
    found = sample(include_prompt_logprobs=True).prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert found[1:] == pytest.approx(logprobs_of(PROMPT)[range(NUM_ROWS), PROMPT[1:]], abs=SAME)
    assert sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result() == found
    assert sample().prompt_logprobs is None


def test_prompt_logprobs_last_n_leave_out_those_before_and_read_what_is_known(
    sampler: tinker.SamplingClient, sample: Sample
) -> None:
    prompt = [7 + 13 * n % 370 for n in range(300)]
    whole = sample(1, prompt, include_prompt_logprobs=True, topk_prompt_logprobs=2)
    part = sample(1, prompt, include_prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=40)
    assert (whole.prompt_cache_hit_tokens, part.prompt_cache_hit_tokens) == (0, 256)
    assert whole.prompt_logprobs is not None
    assert whole.topk_prompt_logprobs is not None
    assert part.prompt_logprobs == [None] * 260 + whole.prompt_logprobs[-40:]
    assert part.topk_prompt_logprobs == [None] * 260 + whole.topk_prompt_logprobs[-40:]
    model_input = types.ModelInput.from_ints(prompt)
    assert sampler.compute_logprobs(model_input, prompt_logprobs_last_n=40).result() == part.prompt_logprobs
    with pytest.raises(tinker.BadRequestError, match="prompt_logprobs_last_n: got 300; must be 1 to 299"):
        sample(1, prompt, include_prompt_logprobs=True, prompt_logprobs_last_n=300)


def test_prompt_cache_hit_tokens_are_those_that_an_earlier_request_computed(sample: Sample) -> None:
    prompt = [9 + 17 * n % 370 for n in range(200)]
    hits = [sample(count, prompt).prompt_cache_hit_tokens for count in (1, 3)]
    assert [*hits, sample(1, [*prompt, 5, 6]).prompt_cache_hit_tokens] == [0, 200, 128]


def test_topk_prompt_logprobs_are_the_likeliest_at_each_place(sample: Sample, logprobs_of: LogprobsOf) -> None:
    found = sample(topk_prompt_logprobs=3).topk_prompt_logprobs
    assert found is not None
    assert found[0] is None
    for cells, logprobs_V in zip(found[1:], logprobs_of(PROMPT)[:-1], strict=True):
        assert cells is not None
        assert [token for token, _ in cells] == np.argsort(-logprobs_V)[:3].tolist()
        assert [logprob for _, logprob in cells] == pytest.approx(np.sort(logprobs_V)[::-1][:3], abs=SAME)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_topk_sample_logprobs_are_the_likeliest_at_each_sampled_place(
    temperature: float, sample: Sample, logprobs_of: Any
) -> None:
    for sequence in sample(2, temperature=temperature, topk_sample_logprobs=4).sequences:
        logprobs_TV = logprobs_of([*PROMPT, *sequence.tokens], temperature or 1.0)[NUM_ROWS:-1]
        assert sequence.topk_logprobs is not None
        assert sequence.logprobs is not None
        places = zip(sequence.topk_logprobs, sequence.tokens, sequence.logprobs, logprobs_TV, strict=True)
        for cells, token, logprob, logprobs_V in places:
            assert cells is not None
            assert [token for token, _ in cells] == np.argsort(-logprobs_V)[:4].tolist()
            assert [logprob for _, logprob in cells] == pytest.approx(np.sort(logprobs_V)[::-1][:4], abs=SAME)
            assert dict(cells).get(token, logprob) == logprob
    assert sample().sequences[0].topk_logprobs is None


@pytest.mark.parametrize("is_sparse", [False, True])
def test_target_prompt_logprobs_come_in_the_layout_of_the_targets(
    is_sparse: bool, sample: Sample, logprobs_of: LogprobsOf
) -> None:
    ids = torch.full((NUM_ROWS, 3), -1, dtype=torch.int64)
    ids[2, 0], ids[2, 2], ids[9, 1] = 77, 0, PROMPT[10]
    targets = types.TensorData.from_torch_sparse(ids, pad_value=-1) if is_sparse else types.TensorData.from_torch(ids)
    assert (targets.sparse_crow_indices is not None) == is_sparse
    response = sample(target_prompt_logprobs=targets, include_prompt_logprobs=True)
    found = response.target_prompt_logprobs
    assert found is not None
    assert (found.dtype, found.shape) == ("float32", targets.shape)
    assert (found.sparse_crow_indices, found.sparse_col_indices) == (
        targets.sparse_crow_indices,
        targets.sparse_col_indices,
    )
    expected = np.where(ids < 0, 0, np.take_along_axis(logprobs_of(PROMPT)[:-1], ids.clamp(min=0).numpy(), 1))
    np.testing.assert_allclose(found.to_torch().numpy(), expected, atol=SAME)
    assert response.prompt_logprobs is not None
    assert found.to_torch()[9, 1] == response.prompt_logprobs[10]


def test_prompt_alt_tokens_are_drawn_anew_at_each_place(sample: Sample, logprobs_of: LogprobsOf) -> None:
    found, again = (sample(prompt_alt_tokens_k=200, temperature=0.5).prompt_alt_tokens for _ in range(2))
    assert found is not None
    assert again is not None
    tokens, logprobs = found.tokens.to_numpy(), found.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (NUM_ROWS, 200)
    np.testing.assert_array_equal(tokens, again.tokens.to_numpy())
    expected = logprobs_of(PROMPT)[:-1]
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, tokens, 1), atol=SAME)
    sharpened = torch.softmax(torch.from_numpy(expected) / 0.5, -1).numpy()
    likeliest = expected.argmax(axis=1)
    share = (tokens == likeliest[:, None]).mean(axis=1)
    np.testing.assert_allclose(share, sharpened[range(NUM_ROWS), likeliest], atol=0.15)


def test_everything_is_asked_for_at_once(sample: Sample) -> None:
    targets = types.TensorData.from_torch(torch.full((NUM_ROWS, 2), 9))
    response = sample(
        2,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=2,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=5,
    )
    assert tokens_of(response) == tokens_of(sample(2))
    whole = sample(include_prompt_logprobs=True, topk_prompt_logprobs=2)
    assert whole.prompt_logprobs is not None
    assert response.prompt_logprobs == [None] * 7 + whole.prompt_logprobs[-5:]
    of_targets, alternatives = sample(target_prompt_logprobs=targets), sample(prompt_alt_tokens_k=2)
    assert response.target_prompt_logprobs is not None
    assert of_targets.target_prompt_logprobs is not None
    assert response.target_prompt_logprobs.tolist() == of_targets.target_prompt_logprobs.tolist()
    assert response.prompt_alt_tokens is not None
    assert alternatives.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.tolist() == alternatives.prompt_alt_tokens.tokens.tolist()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"topk_prompt_logprobs": 385}, "topk_prompt_logprobs: got 385; must be 0 to 384"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs: got -1; must be 0 to 384"),
        ({"prompt_alt_tokens_k": 385}, "prompt_alt_tokens_k: got 385; must be 0 to 384"),
        (
            {"target_prompt_logprobs": types.TensorData(data=[1, 2], dtype="int64", shape=[1, 2])},
            "target_prompt_logprobs.shape: got .1, 2.; must have 11 rows",
        ),
        (
            {"target_prompt_logprobs": types.TensorData(data=[384] * 11, dtype="int64", shape=[11, 1])},
            "target_prompt_logprobs.data.0.: got 384; must be -1",
        ),
    ],
)
def test_what_cannot_be_honoured_is_an_error_at_once(sample: Sample, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(tinker.BadRequestError, match=complaint):
        sample(**options)
