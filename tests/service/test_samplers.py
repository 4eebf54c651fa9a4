"""Sampling sessions on weights that stay and weights that change, samples that are cancelled, clients that join."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.engine.worker import EngineProcess
from tuft.errors import Gone, InvalidInput, NotFound
from tuft.records import SamplingClient, Session, Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.types import (
    AdamParams,
    Datum,
    Failure,
    LoraSpec,
    PromptScoring,
    RunCreated,
    SampleResult,
    SamplerSaved,
    SampleSpec,
    SamplingParams,
)

PROMPT = (1, 2, 3, 4)
SCORE = SampleSpec(PROMPT, SamplingParams(max_tokens=1), scoring=PromptScoring(logprobs=True))
LONG = SampleSpec(PROMPT, SamplingParams(max_tokens=400, stop=()), num_samples=32)
DATUM = Datum(np.asarray(PROMPT[:-1]), {"target_tokens": np.asarray(PROMPT[1:])})


class Client:
    """A client in one session, with one run; it counts its own seqs."""

    def __init__(self, services: Services, tenant: Tenant, session: Session, settled: Settled) -> None:
        self.services, self.tenant, self.session, self.settled = services, tenant, session, settled
        self.run_id = f"{session.session_id}:train:0"
        self._seqs, self._sample_seqs = count(1), count()

    def next_seq(self) -> int:
        return next(self._seqs)

    async def step(self) -> None:
        operations, who = self.services.operations, (self.tenant, self.run_id)
        await operations.forward_backward(*who, self.next_seq(), (DATUM,), "cross_entropy", {}, True)
        await self.settled(await operations.optim_step(*who, self.next_seq(), AdamParams(learning_rate=0.1)))

    async def save(self, kind: str = "snapshot", name: str | None = None) -> str:
        """A sampler's id, or the path of a checkpoint."""
        seq = self.next_seq()
        number = None if name is not None else 100 + seq
        saved = await self.settled(
            await self.services.operations.save_weights_for_sampler(
                self.tenant, self.run_id, seq, name, number, None, {}, kind
            )
        )
        assert isinstance(saved, SamplerSaved), saved
        return str(saved.path or saved.sampling_session_id)

    async def sample(self, sampler_id: str, spec: SampleSpec = SCORE) -> str:
        future_id, _ = await self.services.samplers.sample(self.tenant, sampler_id, next(self._sample_seqs), spec)
        return future_id

    async def score(self, sampler_id: str) -> list[float]:
        """What the sampler says of the prompt."""
        result = await self.settled(await self.sample(sampler_id))
        assert isinstance(result, SampleResult), result
        assert result.prompt_logprobs_P is not None
        logprobs: list[float] = result.prompt_logprobs_P[1:].tolist()
        return logprobs


@pytest.fixture
async def client(services: Services, alice: Tenant, session: Session, settled: Settled) -> Client:
    created = await settled(
        await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2, seed=1), {})
    )
    assert isinstance(created, RunCreated)
    return Client(services, alice, session, settled)


def directories(services: Services) -> list[Path]:
    return [found.parent for found in (services.config.home / "checkpoints").glob("*/*/*/manifest.json")]


# --- weights ----------------------------------------------------------------------------------------------------------


async def test_a_sampler_on_a_snapshot_never_changes(client: Client) -> None:
    """Whatever becomes of the run and of the name, and though its weights leave the engine (which holds one here)."""
    await client.step()
    path = await client.save(name="x")
    samplers = client.services.samplers
    named = samplers.create(client.tenant, client.session.session_id, 0, None, path).sampler_id
    ephemeral = await client.save()
    before = await client.score(named)
    assert await client.score(ephemeral) == before
    await client.step()
    assert await client.save(name="x") == path
    latest = await client.save()
    assert await client.score(latest) != before
    assert [await client.score(one) for one in (named, ephemeral)] == [before] * 2
    client.services.checkpoints.delete(client.tenant, path)
    await client.settled(await client.services.runs.unload(client.tenant, client.run_id))
    assert [await client.score(one) for one in (latest, named, ephemeral)][1:] == [before] * 2


async def test_inflight_samplers_of_a_run_say_what_it_published_last(client: Client) -> None:
    first = await client.save("inflight")
    before = await client.score(first)
    await client.step()
    assert await client.score(first) == before
    second = await client.save("inflight")
    after = await client.score(await client.save())
    assert after != before
    assert [await client.score(one) for one in (first, second)] == [after] * 2
    assert len([one for one in directories(client.services) if one.name.startswith("ephemeral")]) == 2


async def test_an_inflight_request_that_has_begun_keeps_its_weights(client: Client) -> None:
    spec = SampleSpec(PROMPT, SamplingParams(max_tokens=60, temperature=0.0, stop=()))
    await client.step()
    sampler_id = await client.save("inflight")
    expected = await client.settled(await client.sample(sampler_id, spec))
    running = await client.sample(sampler_id, spec)
    await client.step()
    await client.save("inflight")
    began_before, began_after = (
        await client.settled(running),
        await client.settled(await client.sample(sampler_id, spec)),
    )
    assert isinstance(expected, SampleResult)
    assert isinstance(began_before, SampleResult)
    assert isinstance(began_after, SampleResult)
    logprobs = [one.sequences[0].logprobs_N.tolist() for one in (expected, began_before, began_after)]
    assert logprobs[0] == logprobs[1] != logprobs[2]


async def test_inflight_weights_that_are_replaced_while_they_load_are_not_missed(client: Client) -> None:
    services = client.services
    sampler_id = await client.save("inflight")
    run = services.runs.get(client.tenant, client.run_id)
    old = services.samplers.get(client.tenant, sampler_id).directory
    assert old is not None
    for number in range(3):
        await client.save()  # another takes the only place in the engine, so that the next sample loads its weights
        state = await services.checkpoints.read(old, with_optimizer=False)
        new, _ = await services.checkpoints.write(run, "ephemeral", state)
        loading = await client.sample(sampler_id)
        for _ in range(number):
            await asyncio.sleep(0)
        await services.samplers.add_saved(run, number, new, number, is_inflight=True)
        assert isinstance(await client.settled(loading), SampleResult)
        assert not (services.config.home / "checkpoints" / old).exists()
        old = new


async def test_prefixes_are_reused_within_one_inflight_session_only(client: Client) -> None:
    spec = SampleSpec(tuple(range(5, 205)), SamplingParams(max_tokens=1))
    first, second = await client.save("inflight"), await client.save("inflight")
    hits = []
    for sampler_id in (first, first, second, second):
        result = await client.settled(await client.sample(sampler_id, spec))
        assert isinstance(result, SampleResult)
        hits.append(result.prompt_cache_hit_tokens)
    assert hits == [0, 200, 0, 200]


async def test_inflight_weights_come_back_from_disk(client: Client, engine: EngineProcess) -> None:
    await client.step()
    sampler_id = await client.save("inflight")
    before = await client.score(sampler_id)
    await client.save()  # another takes the only place in the engine
    assert await client.score(sampler_id) == before
    client.services.sessions.finish(client.tenant, client.session.session_id, "success", None)
    await client.services.samplers.sweep()
    assert directories(client.services) == []


@pytest.mark.parametrize(
    ("name", "ttl_seconds", "kind", "complaint"),
    [
        ("x", None, "inflight", "path: got 'x'; inflight weights have neither name nor ttl"),
        (None, 3600, "inflight", "ttl_seconds: got 3600; inflight weights have neither"),
        (None, None, "outgoing", "kind: got 'outgoing'; must be 'snapshot' or 'inflight'"),
    ],
)
async def test_a_kind_of_weights_that_cannot_be_is_refused(
    client: Client, name: str | None, ttl_seconds: int | None, kind: str, complaint: str
) -> None:
    future_id = await client.services.operations.save_weights_for_sampler(
        client.tenant, client.run_id, 1, name, 1, ttl_seconds, {}, kind
    )
    failed = await client.settled(future_id)
    assert isinstance(failed, Failure)
    assert failed.message.startswith(complaint)


async def test_a_number_that_is_taken_leaves_nothing_on_disk(client: Client) -> None:
    await client.save()
    operations = client.services.operations
    seq = client.next_seq()
    failed = await client.settled(
        await operations.save_weights_for_sampler(client.tenant, client.run_id, seq, None, 101, None, {})
    )
    assert failed == Failure("sampling_session_seq_id: got 101; is taken in this session", "user")
    assert len(directories(client.services)) == 1


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_a_cancelled_sample_fails_and_the_engine_is_free_for_others(client: Client) -> None:
    sampler_id = await client.save()
    long = [await client.sample(sampler_id, LONG) for _ in range(20)]
    await asyncio.sleep(0.05)  # the first is running, the others wait
    unsent = await client.sample(sampler_id, LONG)
    for future_id in (*long, unsent):
        client.services.futures.cancel(client.tenant, future_id)
    for future_id in (*long, unsent):
        failed = await client.settled(future_id)
        assert failed == Failure("cancelled: its client asked for that", "user")
        client.services.futures.cancel(client.tenant, future_id)  # which changes nothing
    began_s = asyncio.get_running_loop().time()
    await client.score(sampler_id)
    assert asyncio.get_running_loop().time() - began_s < 5.0


async def test_a_sample_can_be_cancelled_while_its_weights_load(client: Client) -> None:
    sampler_id = await client.save()
    before = await client.score(sampler_id)
    await client.save()  # which takes the place in the engine
    loading, waiting = await client.sample(sampler_id, LONG), await client.sample(sampler_id)
    await asyncio.sleep(0)
    client.services.futures.cancel(client.tenant, loading)
    assert isinstance(await client.settled(loading), Failure)
    result = await client.settled(waiting)
    assert isinstance(result, SampleResult)
    assert result.prompt_logprobs_P is not None
    assert result.prompt_logprobs_P[1:].tolist() == before


async def test_what_has_ended_cannot_be_cancelled_nor_what_is_anothers_or_a_runs(client: Client) -> None:
    sampler_id, futures = await client.save(), client.services.futures
    done = await client.sample(sampler_id)
    result = await client.settled(done)
    futures.cancel(client.tenant, done)
    assert await client.settled(done) is result
    bob = client.services.tenants.authenticate(client.services.tenants.create_key("bob"))
    long = await client.sample(sampler_id, LONG)
    for tenant, future_id in ((bob, long), (client.tenant, "future-none")):
        with pytest.raises(Gone):
            futures.cancel(tenant, future_id)
    parked = await client.services.operations.optim_step(client.tenant, client.run_id, 1000, AdamParams())
    with pytest.raises(InvalidInput, match="only samples can be cancelled"):
        futures.cancel(client.tenant, parked)
    assert isinstance(await futures.wait(client.tenant, long, 0.0), Pending)
    futures.cancel(client.tenant, long)


# --- clients ----------------------------------------------------------------------------------------------------------


async def test_the_clients_of_a_session_hear_of_their_own_samples(client: Client) -> None:
    sampler_id, samplers = await client.save(), client.services.samplers
    numbers = [samplers.join(client.tenant, sampler_id) for _ in range(3)]
    assert numbers == [1, 2, 3]
    sent = {
        number: (await samplers.sample(client.tenant, sampler_id, number * 1_000_000_000, SCORE))[0]
        for number in (0, *numbers)
    }
    for number, future_id in sent.items():
        poll = client.services.completions.poll(SamplingClient(sampler_id, number), 0, 30.0)
        assert (await poll)[0] == [future_id]


async def test_only_its_owner_joins_a_session(client: Client) -> None:
    sampler_id, samplers = await client.save(), client.services.samplers
    bob = client.services.tenants.authenticate(client.services.tenants.create_key("bob"))
    for tenant, name in ((bob, sampler_id), (client.tenant, "none")):
        with pytest.raises(NotFound):
            samplers.join(tenant, name)
    assert samplers.join(client.tenant, sampler_id) == 1
