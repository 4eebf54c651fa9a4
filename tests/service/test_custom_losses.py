"""Losses that clients wrote, with their session: made once, kept while it lasts, nobody else's."""

from __future__ import annotations

import json

import pytest

from tests.service.conftest import Settled
from tuft.errors import InvalidInput, NotFound, SeqReused
from tuft.losses import CustomLoss
from tuft.records import Run, Session, Tenant, now
from tuft.service.services import Services
from tuft.types import CustomLossCreated, Failure, LoraSpec

NODES = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
    {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "output", "target": "output", "args": [[{"ref": "total"}, {"dict": {}}]]},
]
LOSS = CustomLoss("total", (("logprobs", 1),), json.dumps(NODES))
BAD = CustomLoss("bad", (("logprobs", 1),), json.dumps([NODES[0], {**NODES[1], "target": "numpy"}, NODES[2]]))


def run_of(session: Session) -> Run:
    spec, moment = LoraSpec(rank=2), now()
    return Run("run", session.tenant_id, session.session_id, 0, "tiny/qwen3", spec, "live", moment, moment, {})


async def test_a_loss_is_created_once_and_named_by_the_runs_of_its_session(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    losses = services.custom_losses
    future_id = await losses.create(alice, session.session_id, 0, LOSS)
    assert await losses.create(alice, session.session_id, 0, LOSS) == future_id  # a retry
    with pytest.raises(SeqReused):
        await losses.create(alice, session.session_id, 0, BAD)
    created = await settled(future_id)
    assert isinstance(created, CustomLossCreated)
    config = {"loss_id": created.loss_id}
    assert losses.named_by(run_of(session), config) == LOSS
    other = services.sessions.create(alice, (), {}, "test", None)
    with pytest.raises(InvalidInput, match="create_custom_loss created in this session"):
        losses.named_by(run_of(other), config)
    with pytest.raises(InvalidInput, match="loss_fn_config.loss_id: got 7"):
        losses.named_by(run_of(session), {"loss_id": 7})


async def test_what_the_engine_refuses_is_not_kept(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    failure = await settled(await services.custom_losses.create(alice, session.session_id, 0, BAD))
    assert isinstance(failure, Failure)
    assert failure.category == "user"
    assert "graph.nodes[1] (total): got 'numpy'; a custom loss may not call this method" in failure.message
    with pytest.raises(InvalidInput):
        services.custom_losses.named_by(run_of(session), {"loss_id": f"{session.session_id}:loss:0"})


async def test_another_tenants_session_is_not_found(services: Services, session: Session) -> None:
    stranger = services.tenants.authenticate(services.tenants.create_key("stranger"))
    with pytest.raises(NotFound):
        await services.custom_losses.create(stranger, session.session_id, 0, LOSS)


async def test_a_session_has_so_many_losses_and_no_more(
    services: Services, alice: Tenant, session: Session, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.custom_losses, "_max_losses", 2)
    results = [await settled(await services.custom_losses.create(alice, session.session_id, i, LOSS)) for i in range(3)]
    assert [isinstance(result, CustomLossCreated) for result in results] == [True, True, False]
    assert "2 custom losses; limits.max_custom_losses is 2" in str(results[2])


async def test_losses_end_with_their_session(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    other = services.sessions.create(alice, (), {}, "test", None)
    for of in (session, other):
        await settled(await services.custom_losses.create(alice, of.session_id, 0, LOSS))
    services.sessions.finish(alice, session.session_id, "success", None)
    await services.custom_losses.sweep()
    with pytest.raises(InvalidInput):
        services.custom_losses.named_by(run_of(session), {"loss_id": f"{session.session_id}:loss:0"})
    assert services.custom_losses.named_by(run_of(other), {"loss_id": f"{other.session_id}:loss:0"}) == LOSS
