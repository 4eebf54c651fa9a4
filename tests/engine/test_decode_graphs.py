"""Decode steps of fixed shapes against the same steps computed as they come."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.reference import CPU, random_adapter_state
from tests.engine.test_sampler import (
    make_sampler,
    prompt_of,
    run,
    sample_of,
    tiny_decoder,
)
from tests.models.operators import ACCELERATED, EAGER
from tuft.engine.decode_graphs import DecodeGraphs
from tuft.engine.sampler import Sampler
from tuft.models.decoder import Precision
from tuft.models.lora import Adapter
from tuft.types import LoraSpec, SampleResult, SamplingParams

SHAPES = tiny_decoder("qwen3").config.linear_shapes()


def new_adapter(spec: LoraSpec, seed: int) -> Adapter:
    state = random_adapter_state(tiny_decoder("qwen3").config, spec, seed)
    return Adapter.from_state(SHAPES, state, CPU, trainable=False)


def sampler_of(name: str, precision: Precision = "float32", **settings: int) -> Sampler:
    ops = {"graphs": ACCELERATED, "as they come": EAGER}[name]
    return make_sampler(tiny_decoder("qwen3", precision, ops), **settings)


def test_only_operators_that_want_graphs_have_them() -> None:
    assert DecodeGraphs.take(tiny_decoder("qwen3", "float32", ACCELERATED))
    assert not DecodeGraphs.take(tiny_decoder("qwen3", "float32", EAGER))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bf16", 0.1)])
def test_what_is_sampled_is_what_would_be_sampled_step_by_step(precision: Precision, tolerance: float) -> None:
    """Adapters of several ranks and none, of different lengths, that come and go."""
    specs = [LoraSpec(rank=4), LoraSpec(rank=8, train_mlp=False), LoraSpec(rank=12), LoraSpec(rank=3)]
    adapters = [None, *(new_adapter(spec, seed) for seed, spec in enumerate(specs))]
    wanted = [
        (
            sample_of(prompt_of(5 + 9 * n, n), SamplingParams(max_tokens=4 + 5 * n, stop=(), temperature=0.0)),
            adapters[n % len(adapters)],
        )
        for n in range(9)
    ]
    by_graphs = run(sampler_of("graphs", precision), wanted, steps_between=2)
    for actual, expected in zip(by_graphs, run(sampler_of("as they come", precision), wanted), strict=True):
        assert isinstance(actual, SampleResult), actual
        assert isinstance(expected, SampleResult), expected
        ours, theirs = actual.sequences[0], expected.sequences[0]
        if precision == "float32":
            np.testing.assert_array_equal(ours.tokens_N, theirs.tokens_N)
        alike = np.cumprod(ours.tokens_N == theirs.tokens_N).astype(bool)  # bf16 may take another way at a tie
        np.testing.assert_allclose(ours.logprobs_N[alike], theirs.logprobs_N[alike], atol=tolerance)


def test_a_few_shapes_serve_every_batch() -> None:
    sampler = sampler_of("graphs")
    adapters = [new_adapter(LoraSpec(rank=8), seed) for seed in range(3)]
    params = SamplingParams(max_tokens=40, stop=())
    wanted = [(sample_of(prompt_of(20 + n, n), params), adapters[n % 3]) for n in range(7)]
    for _ in range(2):
        run(sampler, wanted, steps_between=3)
    graphs = sampler._steps._graphs
    assert graphs is not None
    shapes = set(graphs._steps)
    assert {rows for rows, _, _ in shapes} <= {1, 2, 4, 8}
    assert {pages for _, pages, _ in shapes} <= {4, 8}
    run(sampler, wanted, steps_between=3)
    assert set(graphs._steps) == shapes
