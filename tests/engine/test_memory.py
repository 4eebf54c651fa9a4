import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.crowd import started
from tests.engine.reference import CPU, smollm2_path
from tests.models.tiny import make_tiny_model
from tuft.engine.base import BaseModelSource, Command, CreateAdapter, EngineSettings, OptimStep, RunLoss
from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.engine.memory import (
    adapter_memory,
    check_weights,
    fitted,
    host_limit,
    memory_left,
    memory_plan,
    sample_token_bytes,
)
from tuft.engine.packing import pack
from tuft.engine.worker import EngineProcess
from tuft.errors import ConfigError
from tuft.footprint import adapter_parameters, longest_sequence
from tuft.models.decoder import Decoder, Precision
from tuft.models.load import load_weights
from tuft.models.lora import Adapter
from tuft.models.packed import PackedAttention
from tuft.types import AdamParams, BaseModelInfo, Datum, LoraSpec

SETTINGS = EngineSettings(micro_batch_tokens=256, kv_cache_tokens=512)


@pytest.fixture(params=["bf16", "float32"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    precision: Precision = request.param
    return Decoder(load_weights(str(make_tiny_model("llama", tmp_path))), precision, CPU)


def test_weights_samples_and_runs_need_what_they_take(decoder: Decoder) -> None:
    config = decoder.config
    weights, training, samples, run = memory_plan(config, SETTINGS, decoder.dtype.itemsize, is_packed=False)
    assert weights.num_bytes == config.num_parameters * decoder.dtype.itemsize
    pages = KvPages(config, num_pages_of(SETTINGS.kv_cache_tokens), decoder.dtype, CPU).pages
    assert samples.num_bytes == pages[:-1].nbytes  # all but the blank one
    adapter = Adapter(config.linear_shapes(), LoraSpec(rank=32), CPU)
    assert run.num_bytes == 4 * adapter.params_P.nbytes  # with gradients and two moments
    assert f"{SETTINGS.micro_batch_tokens} tokens" in training.purpose


def test_a_pass_keeps_about_what_was_told(decoder: Decoder) -> None:
    _, training, *_ = memory_plan(decoder.config, SETTINGS, decoder.dtype.itemsize, is_packed=False)
    tokens = np.arange(SETTINGS.micro_batch_tokens) % decoder.config.vocab_size
    packed = pack([(Datum(tokens, {"target_tokens": tokens}),)], share_prefixes=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = PackedAttention(packed.branches, CPU)
        decoder.hidden(torch.as_tensor(packed.tokens_T), torch.as_tensor(packed.positions_T), attention, [])
    weights = decoder.config.num_parameters * decoder.dtype.itemsize
    assert 0.5 * training.num_bytes < sum(kept.values()) < 2 * training.num_bytes + weights


def test_adapters_may_have_what_passes_and_samples_leave(decoder: Decoder) -> None:
    assert adapter_memory([decoder], SETTINGS) is None  # on a CPU
    _, training, samples, _ = memory_plan(decoder.config, SETTINGS, decoder.dtype.itemsize, is_packed=False)
    planned = training.num_bytes + samples.num_bytes
    assert 0 < memory_left(2 * planned, [decoder], SETTINGS) < planned
    assert memory_left(2 * planned, [decoder, decoder], SETTINGS) < memory_left(2 * planned, [decoder], SETTINGS)


def test_a_plan_that_leaves_nothing_is_an_error_that_names_what_to_lower(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match=r"lower engine\.micro_batch_tokens or engine\.kv_cache_tokens"):
        memory_left(2**20, [decoder], EngineSettings())


def test_packed_weights_are_told_of(decoder: Decoder) -> None:
    purposes = [need.purpose for need in memory_plan(decoder.config, SETTINGS, 2, is_packed=True)]
    assert sum("decoding" in purpose for purpose in purposes) == 1


def test_with_memory_enough_nothing_is_cut(decoder: Decoder) -> None:
    settings, (memory,) = fitted(SETTINGS, [decoder])
    assert settings == SETTINGS
    assert memory is not None
    assert memory.pass_tokens == SETTINGS.micro_batch_tokens
    assert memory.pass_bytes == memory.adapter_bytes


def test_passes_and_samples_are_cut_to_what_the_limit_leaves(decoder: Decoder) -> None:
    wanted = EngineSettings(micro_batch_tokens=10**6, kv_cache_tokens=10**9, memory_limit_gib=0.9)
    limit = host_limit(wanted)
    settings, (memory,) = fitted(wanted, [decoder])
    assert memory is not None
    assert 64 <= settings.micro_batch_tokens < 10**6
    assert 256 <= settings.kv_cache_tokens < 10**9
    samples = settings.kv_cache_tokens * sample_token_bytes(decoder.config, decoder.dtype.itemsize)
    weights = decoder.config.num_parameters * decoder.dtype.itemsize
    assert weights + samples + memory.pass_bytes + memory.adapter_bytes < limit
    assert settings.micro_batch_tokens * memory.row_bytes + memory.fixed_bytes <= memory.pass_bytes / 2
    tighter, _ = fitted(replace(wanted, memory_limit_gib=0.8), [decoder])
    assert tighter.micro_batch_tokens < settings.micro_batch_tokens


def test_a_limit_too_small_for_the_smallest_pass_is_an_error_with_the_least_that_does(decoder: Decoder) -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.memory_limit_gib .* need [\d,]+ bytes, and 429,496,729 are"
    ) as said:
        fitted(replace(SETTINGS, memory_limit_gib=0.4), [decoder])
    least = int(re.findall(r"need ([\d,]+) bytes", str(said.value))[0].replace(",", ""))
    settings, _ = fitted(replace(SETTINGS, memory_limit_gib=(least + 4096) / 2**30), [decoder])
    assert settings.micro_batch_tokens >= 64


def test_weights_that_do_not_fit_beside_others_are_refused_before_they_are_allocated(decoder: Decoder) -> None:
    settings, precision = replace(SETTINGS, memory_limit_gib=0.45), decoder.precision
    check_weights(decoder.config, settings, precision, CPU, [])
    with pytest.raises(ConfigError, match=r"the base weights need [\d,]+ bytes, and [\d,]+ are there"):
        check_weights(replace(decoder.config, vocab_size=10**6), settings, precision, CPU, [])
    with pytest.raises(ConfigError, match="the base weights need"):
        check_weights(decoder.config, settings, precision, CPU, [decoder] * 10**4)


@pytest.mark.slow
def test_an_engine_stays_within_its_limit_and_computes_the_same(tmp_path: Path) -> None:
    """SmolLM2 in three passes of what is one otherwise, three at once."""
    source = BaseModelSource("smollm", str(smollm2_path()), str(tmp_path), precision="bf16")
    limit_gib = 2.25
    settings = EngineSettings(device="cpu", micro_batch_tokens=4096, memory_limit_gib=limit_gib)
    engine = started(source, settings)
    try:
        (model,) = engine.base_models
        assert model.memory is not None
        assert engine.pass_tokens == model.memory.pass_tokens < 1000
        longest = longest_sequence(model.memory, adapter_parameters(model.linear_shapes, LoraSpec(32)))
        peak_reset(engine)
        results = [one.result(300) for one in engine.submit(operations(model, longest))]
        assert [result.metrics["loss:sum"] for result in results[3:6]] == [results[3].metrics["loss:sum"]] * 3
        assert peak_bytes(engine) < limit_gib * 2**30
    finally:
        engine.close()


def operations(model: BaseModelInfo, longest: int) -> list[Command]:
    assert model.memory is not None
    names = ("a", "b", "c")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, model.vocab_size, size) for size in (model.memory.pass_tokens, min(longest, 2048))]
    losses = [
        RunLoss(name, (Datum(tokens_T, {"target_tokens": tokens_T}),), "cross_entropy", operation_id=f"{number}")
        for number, tokens_T in enumerate(tokens)
        for name in names
    ]
    spec = LoraSpec(32, seed=1)
    return [
        *(CreateAdapter(name, model.name, spec) for name in names),
        *losses,
        *(OptimStep(n, AdamParams()) for n in names),
    ]


def peak_reset(engine: EngineProcess) -> None:
    Path(f"/proc/{engine.pid}/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(engine: EngineProcess) -> int:
    status = Path(f"/proc/{engine.pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024
