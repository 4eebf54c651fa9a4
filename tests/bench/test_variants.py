"""Every variant computes the same thing, on a tiny model: what is compared is comparable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import baselines, kernels, mixed, ours, server
from bench.tenants import crowd
from bench.workloads import BaseModel, Optimizer, Sampling, Text, Training, equal, grpo, ragged
from tests.models.tiny import VOCAB_SIZE, make_tiny_model
from tuft.types import LoraSpec

SPEC = LoraSpec(rank=4, train_unembed=False)


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CACHE", None)  # compiling takes longer than all of this


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel("tiny", str(make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")))


def random_text() -> Text:
    return Text(np.random.default_rng(0).integers(3, VOCAB_SIZE, 1000))


def workloads() -> dict[str, Training]:
    text = random_text()
    return {
        "equal": equal(text, SPEC, 3, 2, 16),
        "ragged": ragged(text, SPEC, 3, 2, 32),
        "grpo": grpo(text, SPEC, 3, 40, 8),
        "cut": equal(text, SPEC, 2, 150, 16),  # more than a pass
    }


@pytest.mark.parametrize("case", ["equal", "ragged", "grpo", "cut"])
def test_every_training_variant_begins_with_the_same_loss(base: BaseModel, case: str) -> None:
    builds = [
        ours.training(base, workloads(), "float32"),
        ours.training(base, workloads(), "float32", share_prefixes=False),
        baselines.peft_training(base, workloads(), autocast=False),
    ]
    losses = []
    for build in builds:
        with build as compute:
            losses += compute(case, True)["loss"]
            assert compute(case, False)["seconds"][0] > 0
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_the_floor_counts_distinct_rows() -> None:
    text = Text(np.arange(5000))
    assert grpo(text, SPEC).num_tokens == 8 * 576
    assert grpo(text, SPEC).num_rows(2048) == 512 + 8 * 64
    assert equal(text, SPEC, 2, 4, 256).num_rows(2048) == 2048


def test_passes_hold_all_parts_in_order_within_their_rows() -> None:
    workload = ragged(Text(np.arange(9000)), SPEC)
    for share in (True, False):
        passes = ours.passes_of(workload, 600, share)
        assert all(sum(part.num_tokens for part in parts) <= 600 for parts in passes)
        parts = [part for of_one in passes for part in of_one]
        assert [datum for part in parts for datum in part.data] == list(workload.data)
        assert [part.adapter_id for part in parts if part.is_last] == ["0", "1", "2", "3"]
        assert all(
            (part.first_datum == 0) == (part.data[0] is workload.tenants[int(part.adapter_id)][0]) for part in parts
        )


def test_samplers_and_generate_draw_every_token_they_are_asked_for(base: BaseModel) -> None:
    cases = {"shared": Sampling(2, 2, 0, 8, 6, shares_prompt=True), "adapter": Sampling(2, 1, 1, 8, 6)}
    builds = [
        ours.sampling(base, cases, "float32", SPEC, random_text()),
        baselines.generate(base, cases, torch.float32, random_text(), None),
        baselines.generate(base, cases, torch.float32, random_text(), SPEC),
    ]
    for build in builds:
        with build as compute:
            for case in cases:
                compute(case, True)  # each checks by itself that nothing ended early
                assert compute(case, False)["seconds"][0] > 0


def test_optimizers_update_all_runs(base: BaseModel) -> None:
    cases = {"few": Optimizer(SPEC, 3)}
    for build in (ours.optimizer(base, cases), baselines.torch_optimizers(base, cases, fused=True)):
        with build as compute:
            assert len(compute("few", True)["seconds"]) == len(compute("few", False)["seconds"]) > 1


def test_sampling_and_training_share_an_engine(base: BaseModel) -> None:
    workload = equal(random_text(), SPEC, 1, 2, 16)
    with mixed.tuft(base, workload, Sampling(2, num_prompt=8, num_new=6), random_text(), seconds=0.1) as compute:
        both = compute(mixed.BOTH, False)
    assert len(both["gap"]) % 5 == 0
    assert both["sampled"][0] == len(both["gap"]) / 5 * 12
    assert both["trained"][0] == 32 * len(both["pass"])


@pytest.mark.slow
def test_engine_and_server_compute_the_same_operations(base: BaseModel) -> None:
    workload, smallest = equal(random_text(), SPEC, 1, 2, 16), equal(random_text(), SPEC, 1, 1, 4)
    for build in (server.engine_alone, server.through_sdk):
        with build(base, workload, smallest) as compute:
            assert len(compute(server.STEP, True)["seconds"]) == 1
            assert len(compute(server.SMALLEST, False)["seconds"]) == server.SMALLEST_A_ROUND


@pytest.mark.slow
def test_every_tenant_of_a_crowd_has_its_latency(base: BaseModel) -> None:
    measured = crowd(base, equal(random_text(), SPEC, 3, 1, 16), rounds=2)
    assert len(measured.latencies_s) == 6
    assert measured.engine_bytes > measured.server_bytes > 2**20
