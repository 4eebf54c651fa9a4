from __future__ import annotations

from pathlib import Path

from tests.conftest import TINY_MODEL
from tuft.app import open_store, start_engine
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.records import FutureKey
from tuft.service.calls import SampleCall
from tuft.service.services import Services
from tuft.types import SampleResult, SampleSpec, SamplingParams


async def test_samples_of_an_earlier_server_wait_for_an_engine_that_is_still_loading(
    config_file: Path, engine: EngineProcess, tmp_path: Path
) -> None:
    config = load_config(config_file, home=tmp_path)
    database = open_store(config)
    earlier = Services(config, database, engine)
    await earlier.start()
    alice = earlier.tenants.authenticate(earlier.tenants.create_key("alice"))
    session = earlier.sessions.create(alice, (), {}, "test", None)
    sampler = earlier.samplers.create(alice, session.session_id, 0, TINY_MODEL, None)
    call = SampleCall(SampleSpec((1, 2, 3), SamplingParams(max_tokens=2, stop=())))
    prepared = earlier.futures.prepare(call, lambda: (call, 0))
    accepted = [
        (await earlier.futures.accept(alice, FutureKey("sample", sampler.sampler_id, seq), "sample", prepared))[0]
        for seq in range(3)
    ]
    await earlier.stop()
    loading = start_engine(config)
    try:
        later = Services(config, database, loading)
        await later.start()
        for future_id in accepted:
            result = await later.futures.wait(alice, future_id, hold_s=60.0)
            assert isinstance(result, SampleResult)
            assert len(result.sequences[0].tokens_N) == 2
        await later.stop()
    finally:
        loading.close()
        database.close()
