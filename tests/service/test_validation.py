from __future__ import annotations

import pytest

from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.service.validation import check_lora, check_ttl
from tuft.types import BaseModelInfo, LoraSpec

MODEL = BaseModelInfo("tiny", (), "LlamaForCausalLM", 100, 16, 1000, "float32", (2,), "/tmp", {})
LIMITS = LimitsSection()


@pytest.mark.parametrize("rank", [0, -1, 257, 10**9])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(InvalidInput, match=rf"lora_config.rank: got {rank}; must be 1 to 256"):
        check_lora(LoraSpec(rank=rank), LIMITS)


def test_an_adapter_without_layers_is_refused() -> None:
    with pytest.raises(InvalidInput, match="train_attn, train_mlp, train_unembed"):
        check_lora(LoraSpec(train_attn=False, train_mlp=False, train_unembed=False), LIMITS)


@pytest.mark.parametrize("ttl_seconds", [0, 3599, 10**12])
def test_a_ttl_out_of_range_is_refused(ttl_seconds: int) -> None:
    with pytest.raises(InvalidInput, match="ttl_seconds"):
        check_ttl(ttl_seconds)
