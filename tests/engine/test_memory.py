from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.reference import CPU
from tests.models.tiny import make_tiny_model
from tuft.engine.base import EngineSettings
from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.engine.memory import adapter_memory, memory_left, memory_plan
from tuft.engine.packing import pack
from tuft.errors import ConfigError
from tuft.models.decoder import Decoder, Precision
from tuft.models.load import load_weights
from tuft.models.lora import Adapter
from tuft.models.packed import PackedAttention
from tuft.types import Datum, LoraSpec

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
