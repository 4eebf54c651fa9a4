"""Runs, operations and samplers together, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.engine.base import Command, Sample
from tuft.engine.worker import EngineProcess
from tuft.errors import InvalidInput, NotFound, QuotaExceeded
from tuft.records import Session, Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.types import (
    AdamParams,
    Datum,
    Failure,
    LoraSpec,
    LossResult,
    OptimStepResult,
    RunCreated,
    SampleResult,
    SamplerSaved,
    SampleSpec,
    SamplingParams,
    WeightsSaved,
)

DATUM = Datum(np.asarray([1, 2, 3]), {"target_tokens": np.asarray([2, 3, 4])})
BAD = Datum(np.asarray([1, 2, 9999]), {"target_tokens": np.asarray([2, 3, 4])})


@pytest.fixture
async def run_id(services: Services, alice: Tenant, session: Session, settled: Settled) -> str:
    created = await settled(await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2), {}))
    assert isinstance(created, RunCreated)
    return created.run_id


async def backward(services: Services, tenant: Tenant, run_id: str, seq: int, *data: Datum) -> str:
    return await services.operations.forward_backward(tenant, run_id, seq, data, "cross_entropy", {}, True)


async def test_a_retry_gets_the_first_calls_future_and_computes_once(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    first, retry = [await backward(services, alice, run_id, 1, DATUM) for _ in range(2)]
    assert first == retry
    await settled(first)
    assert await backward(services, alice, run_id, 1, DATUM) == first
    twice = await settled(await services.operations.optim_step(alice, run_id, 2, AdamParams()))
    assert isinstance(twice, OptimStepResult)
    once = await settled(await backward(services, alice, run_id, 3, DATUM))
    assert isinstance(once, LossResult)


async def test_creating_a_run_twice_makes_it_once(services: Services, alice: Tenant, session: Session) -> None:
    calls = [
        await services.runs.create(alice, session.session_id, 5, TINY_MODEL, LoraSpec(rank=2), {}) for _ in range(2)
    ]
    assert calls[0] == calls[1]
    assert services.runs.list(alice, 10, 0)[1] == 1


async def test_operations_that_arrive_out_of_order_run_in_order(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    step = await services.operations.optim_step(alice, run_id, 3, AdamParams())
    second = await backward(services, alice, run_id, 2, DATUM)
    assert isinstance(await services.futures.wait(alice, second, hold_s=0.05), Pending)
    first = await backward(services, alice, run_id, 1, DATUM)
    results = [await settled(future_id) for future_id in (first, second, step)]
    assert isinstance(results[2], OptimStepResult)
    assert results[2].metrics["grad_norm:mean"] > 0


async def test_a_failed_operation_consumes_its_seq(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    failed = await settled(await backward(services, alice, run_id, 1, BAD))
    assert failed == Failure("data[0].model_input[2]: got 9999; token ids of tiny/qwen3 are 0 to 383", "user")
    assert isinstance(await settled(await backward(services, alice, run_id, 2, DATUM)), LossResult)


async def test_a_rejected_payload_consumes_its_seq(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    rejected = await services.operations.reject(alice, run_id, 1, InvalidInput("body", "x", "must be y"))
    assert await settled(rejected) == Failure("body: got 'x'; must be y", "user")
    assert isinstance(await settled(await backward(services, alice, run_id, 2, DATUM)), LossResult)


async def test_a_seq_that_never_comes_is_given_up_and_the_run_goes_on(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    given_up = await settled(await backward(services, alice, run_id, 2, DATUM))
    assert isinstance(given_up, Failure)
    assert given_up.category == "server"
    assert "earlier seq_id" in given_up.message
    assert isinstance(await settled(await backward(services, alice, run_id, 3, DATUM)), LossResult)
    late = await settled(await backward(services, alice, run_id, 1, DATUM))
    assert isinstance(late, Failure)
    assert "had its turn" in late.message


async def test_the_number_of_loaded_runs_is_limited_per_tenant(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    runs = [
        await services.runs.create(alice, session.session_id, n, TINY_MODEL, LoraSpec(rank=2), {}) for n in range(3)
    ]
    created = [await settled(future_id) for future_id in runs]
    with pytest.raises(QuotaExceeded, match="max_runs_per_tenant is 3"):
        await services.runs.create(alice, session.session_id, 3, TINY_MODEL, LoraSpec(rank=2), {})
    assert isinstance(created[0], RunCreated)
    await settled(await services.runs.unload(alice, created[0].run_id))
    await services.runs.create(alice, session.session_id, 3, TINY_MODEL, LoraSpec(rank=2), {})


async def test_a_finished_sessions_runs_are_unloaded_and_say_so(
    services: Services, alice: Tenant, session: Session, run_id: str, settled: Settled
) -> None:
    services.sessions.finish(alice, session.session_id, "success", None)
    await services.runs.sweep()
    assert services.runs.get(alice, run_id).status == "unloaded"
    after = await settled(await backward(services, alice, run_id, 1, DATUM))
    assert isinstance(after, Failure)
    assert "unloaded" in after.message


async def test_a_finished_sessions_ephemeral_weights_are_deleted_and_its_checkpoints_kept(
    services: Services, alice: Tenant, session: Session, run_id: str, settled: Settled
) -> None:
    await settled(await services.operations.save_weights_for_sampler(alice, run_id, 1, None, 1, None, {}))
    await settled(await services.operations.save_weights_for_sampler(alice, run_id, 2, "named", None, None, {}))
    root = services.config.home / "checkpoints"
    await services.samplers.sweep()
    assert len(list(root.glob("*/*/*/manifest.json"))) == 2
    services.sessions.finish(alice, session.session_id, "success", None)
    await services.samplers.sweep()
    (kept,) = root.glob("*/*/*/manifest.json")
    assert kept.parent.name.startswith("named-")


async def test_samplers_beyond_the_limit_leave_and_come_back_from_disk(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    saved = [
        await settled(await services.operations.save_weights_for_sampler(alice, run_id, seq, None, seq, None, {}))
        for seq in (1, 2)
    ]
    params = SamplingParams(max_tokens=2, temperature=0.0)
    for sampler in saved:
        assert isinstance(sampler, SamplerSaved)
        assert sampler.sampling_session_id is not None
        future_id, sequence_ids = await services.samplers.sample(
            alice, sampler.sampling_session_id, 0, SampleSpec((1, 2, 3), params, num_samples=2)
        )
        assert len(sequence_ids) == 2
        result = await settled(future_id)
        assert isinstance(result, SampleResult)
        assert len(result.sequences) == 2


async def test_two_tenants_same_checkpoint_names_are_two_things(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    saved = await settled(await services.operations.save_weights(alice, run_id, 1, "x", None, False, {}))
    assert isinstance(saved, WeightsSaved)
    bob = services.tenants.authenticate(services.tenants.create_key("bob"))
    with pytest.raises(NotFound):
        services.checkpoints.get(bob, saved.path)
    with pytest.raises(NotFound):
        await backward(services, bob, run_id, 2, DATUM)
    assert services.checkpoints.get(alice, saved.path).has_optimizer


async def test_training_and_sampler_checkpoints_of_one_name_are_two_things(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    await settled(await services.operations.save_weights(alice, run_id, 1, "x", None, False, {}))
    await settled(await services.operations.save_weights_for_sampler(alice, run_id, 2, "x", None, None, {}))
    services.checkpoints.delete(alice, f"tinker://{run_id}/sampler_weights/x")
    checkpoints, total = await services.checkpoints.list(alice.tenant_id, run_id, ("training", "sampler"), 10, 0)
    assert ([str(found.path) for found in checkpoints], total) == ([f"tinker://{run_id}/weights/x"], 1)
    await services.checkpoints.read(checkpoints[0].directory, with_optimizer=True)


async def test_a_checkpoint_of_another_shape_does_not_load(
    services: Services, alice: Tenant, session: Session, run_id: str, settled: Settled
) -> None:
    await settled(await services.operations.save_weights(alice, run_id, 1, "small", None, False, {}))
    other = await settled(await services.runs.create(alice, session.session_id, 1, TINY_MODEL, LoraSpec(rank=4), {}))
    assert isinstance(other, RunCreated)
    path = f"tinker://{run_id}/weights/small"
    failed = await settled(await services.operations.load_weights(alice, other.run_id, 1, path, False, None))
    assert isinstance(failed, Failure)
    assert "its rank is 2, the run's is 4" in failed.message


async def test_a_sampler_checkpoint_has_no_optimizer_to_load(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    await settled(await services.operations.save_weights_for_sampler(alice, run_id, 1, "x", None, None, {}))
    path = f"tinker://{run_id}/sampler_weights/x"
    failed = await settled(await services.operations.load_weights(alice, run_id, 2, path, True, None))
    assert isinstance(failed, Failure)
    assert "no optimizer state" in failed.message


async def test_a_damaged_checkpoint_fails_the_load_and_leaves_the_run_as_it_was(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    saved = await settled(await services.operations.save_weights(alice, run_id, 1, "x", None, False, {}))
    assert isinstance(saved, WeightsSaved)
    directory = services.config.home / "checkpoints" / services.checkpoints.get(alice, saved.path).directory
    (directory / "adapter_model.safetensors").write_bytes(b"damaged")
    failed = await settled(await services.operations.load_weights(alice, run_id, 2, saved.path, False, None))
    assert isinstance(failed, Failure)
    assert failed.category == "server"
    assert "has 7 bytes" in failed.message
    assert isinstance(await settled(await backward(services, alice, run_id, 3, DATUM)), LossResult)


async def test_inputs_of_other_losses_ride_along_and_change_nothing(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    extra = Datum(DATUM.tokens_T, {**DATUM.loss_fn_inputs, "advantages": np.ones(3, dtype=np.float32)})
    plain = await settled(await backward(services, alice, run_id, 1, DATUM))
    laden = await settled(await backward(services, alice, run_id, 2, extra))
    assert isinstance(plain, LossResult)
    assert isinstance(laden, LossResult)
    assert laden.metrics == plain.metrics


async def test_a_run_from_a_damaged_checkpoint_fails_and_takes_no_more_operations(
    services: Services, alice: Tenant, session: Session, run_id: str, settled: Settled
) -> None:
    saved = await settled(await services.operations.save_weights(alice, run_id, 1, "x", None, False, {}))
    assert isinstance(saved, WeightsSaved)
    directory = services.config.home / "checkpoints" / services.checkpoints.get(alice, saved.path).directory
    (directory / "adapter_model.safetensors").write_bytes(b"damaged")
    failed = await settled(
        await services.runs.create_from_checkpoint(alice, session.session_id, 7, saved.path, False, None, {}, None)
    )
    assert isinstance(failed, Failure)
    assert "has 7 bytes" in failed.message
    new_id = f"{session.session_id}:train:7"
    assert services.runs.get(alice, new_id).status == "failed"
    after = await settled(await backward(services, alice, new_id, 1, DATUM))
    assert isinstance(after, Failure)
    assert "is failed" in after.message


async def test_a_run_unloaded_while_it_begins_stays_unloaded(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    creating = await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2), {})
    await asyncio.sleep(0.02)  # the engine has the command, its reply is on the way or here
    await settled(await services.runs.unload(alice, f"{session.session_id}:train:0"))
    await settled(creating)
    assert services.runs.get(alice, f"{session.session_id}:train:0").status == "unloaded"


async def test_overwriting_a_checkpoint_deletes_what_it_replaces(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    root = services.config.home / "checkpoints"
    for seq in (1, 2, 3):
        await settled(await services.operations.save_weights(alice, run_id, seq, "x", None, True, {}))
    assert len(list(root.glob("*/*/x-*"))) == 1
    # a sampler keeps the weights that it was made from
    path = f"tinker://{run_id}/weights/x"
    services.samplers.create(alice, services.runs.get(alice, run_id).session_id, 0, None, path)
    await settled(await services.operations.save_weights(alice, run_id, 4, "x", None, True, {}))
    assert len(list(root.glob("*/*/x-*"))) == 2


async def test_many_tenants_at_once_all_get_their_results(services: Services, alice: Tenant) -> None:
    async def tenant_loop(name: str) -> list[float]:
        tenant = services.tenants.authenticate(services.tenants.create_key(name))
        session = services.sessions.create(tenant, (), {}, "test", None)
        spec = LoraSpec(rank=2, seed=1)
        created = await services.futures.wait(
            tenant, await services.runs.create(tenant, session.session_id, 0, TINY_MODEL, spec, {}), 30.0
        )
        assert isinstance(created, RunCreated)
        losses = []
        for step in range(4):
            future_id = await backward(services, tenant, created.run_id, 2 * step + 1, DATUM, DATUM)
            await services.operations.optim_step(tenant, created.run_id, 2 * step + 2, AdamParams(learning_rate=0.01))
            result = await services.futures.wait(tenant, future_id, 30.0)
            assert isinstance(result, LossResult)
            losses.append(result.metrics["loss:sum"])
        return losses

    alone = await tenant_loop("first")
    together = await asyncio.gather(*(tenant_loop(f"tenant{number}") for number in range(8)))
    assert all(losses == alone for losses in together)


async def test_an_operation_larger_than_a_pass_has_one_result(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    data = []
    for first in range(8):
        tokens_T = (np.arange(400 + first) + first) % 300 + 5
        data.append(Datum(tokens_T, {"target_tokens": tokens_T + 1}))
    future_id = await backward(services, alice, run_id, 1, *data)
    step = await services.operations.optim_step(alice, run_id, 2, AdamParams(learning_rate=1e-2))
    whole = await settled(future_id)
    assert isinstance(whole, LossResult)
    assert [len(logprobs) for logprobs in whole.logprobs] == [len(datum.tokens_T) for datum in data]
    assert whole.metrics["loss:sum"] == pytest.approx(-sum(logprobs.sum() for logprobs in whole.logprobs))
    assert isinstance(await settled(step), OptimStepResult)
    after = await settled(await backward(services, alice, run_id, 3, *data))
    assert isinstance(after, LossResult)
    assert after.metrics["loss:sum"] < whole.metrics["loss:sum"]


async def test_prompts_are_reused_within_a_tenant_alone(
    services: Services, engine: EngineProcess, alice: Tenant, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = services.samplers.create(alice, session.session_id, 0, TINY_MODEL, None)
    commands: list[Command] = []
    submit = engine.submit

    def watched(batch: Sequence[Command]) -> list[Future[Any]]:
        commands.extend(batch)
        return submit(batch)

    monkeypatch.setattr(engine, "submit", watched)
    spec = SampleSpec((1, 2, 3), SamplingParams(max_tokens=1))
    future_id, _ = await services.samplers.sample(alice, sampler.sampler_id, 0, spec)
    assert isinstance(await services.futures.wait(alice, future_id, 30.0), SampleResult)
    (command,) = commands
    assert isinstance(command, Sample)
    assert command.cache_scope == alice.tenant_id
