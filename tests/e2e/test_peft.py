"""What was saved here loads elsewhere: PEFT reads the checkpoint and computes the same."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tinker
import torch
import transformers
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import TOKENS, datum, step


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_peft_loads_a_checkpoint_and_gives_the_same_logprobs(
    tiny_server: LiveServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()
    for _ in range(5):
        step(training, [datum()])
    save = training.save_state if kind == "weights" else training.save_weights_for_sampler
    save("for-peft").result()
    sampler = training.save_weights_and_get_sampling_client().result()
    ours = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()[1:]

    run_id = training.get_info().model_id
    directories = list(tiny_server.home.glob(f"checkpoints/*/{run_id}/for-peft-*"))
    (directory,) = directories
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, directory)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    theirs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-4)
