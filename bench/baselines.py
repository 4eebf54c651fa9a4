"""What this engine is measured beside: the floor, transformers + peft, torch.optim and transformers.generate.

Shape letters: ``B`` sequences of a padded batch, ``L`` its length, ``M`` its positions, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.measure import SHORT_REPEATS, Compute, Figures
from bench.workloads import BaseModel, Optimizer, Sampling, Text, Training, adapter_states, texts_of
from tests.engine.reference import smollm2_transformers
from tuft.engine.base import EngineSettings
from tuft.models.architecture import DecoderConfig
from tuft.models.load import load_weights
from tuft.types import LORA_ALPHA, AdamParams, AdapterState, LoraSpec

HEAD_ROWS = 128
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_ADAM = AdamParams()


def transformers_model(base: BaseModel, dtype: torch.dtype = torch.float32) -> Any:
    if Path(base.path).is_dir():
        return AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    return smollm2_transformers(dtype)


def decoder_config(base: BaseModel) -> DecoderConfig:
    return load_weights(base.path).config


# --- the floor --------------------------------------------------------------------------------------------------------


@contextmanager
def floor(base: BaseModel, workloads: Mapping[str, Training]) -> Iterator[Compute]:
    """The base model's matrix products alone, in bf16: forward and input gradients of all layers for every distinct
    row; the head forward for every row, backward for every weighted one. What no engine on this machine can beat."""
    config = decoder_config(base)
    kv = 2 * config.num_kv_heads * config.head_dim
    q, hidden, inner = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size
    shapes = [(q + kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)] * config.num_layers
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    head = torch.randn(config.vocab_size, hidden, dtype=torch.bfloat16)
    chunk = torch.randn(HEAD_ROWS, hidden, dtype=torch.bfloat16)
    dlogits = torch.randn(HEAD_ROWS, config.vocab_size, dtype=torch.bfloat16)

    def products(num_rows: int, rows: Mapping[int, Tensor]) -> None:
        for weight in weights:
            F.linear(rows[weight.shape[1]][:num_rows], weight)
            torch.mm(rows[weight.shape[0]][:num_rows], weight)

    def compute(case: str, warm_up: bool) -> Figures:
        workload = workloads[case]
        max_rows = EngineSettings().micro_batch_tokens
        num_rows = workload.num_rows(max_rows)
        num_weighted = sum(int(np.count_nonzero(datum.loss_fn_inputs["weights"])) for datum in workload.data)
        sizes = {size for shape in shapes for size in shape}
        rows = {size: torch.randn(max_rows, size, dtype=torch.bfloat16) for size in sizes}
        began = time.perf_counter()
        for first in range(0, max_rows if warm_up else num_rows, max_rows):
            products(min(max_rows, num_rows - first), rows)
        for _ in range(-(-num_rows // HEAD_ROWS)):
            F.linear(chunk, head)
        for _ in range(-(-num_weighted // HEAD_ROWS)):
            torch.mm(dlogits, head)
        return {"seconds": [time.perf_counter() - began]}

    yield compute


# --- transformers + peft ----------------------------------------------------------------------------------------------


class PeftAdapters:
    """``base`` under peft with several adapters, of which one at a time is set."""

    def __init__(self, base: Any, states: Sequence[AdapterState]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie.*")  # the head is tied to the embedding; only LoRA trains
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers deprecates
            self.model = get_peft_model(base, _lora_config(states[0].spec), adapter_name="0")
            for number, state in enumerate(states[1:], start=1):
                self.model.add_adapter(str(number), _lora_config(state.spec))
        parameters = dict(self.model.named_parameters())
        self.parameters: list[list[torch.nn.Parameter]] = []
        with torch.no_grad():
            for number, state in enumerate(states):
                of_one = []
                for name, array in state.weights.items():
                    parameter = parameters[name.replace(".weight", f".{number}.weight")]
                    parameter.copy_(torch.from_numpy(array))
                    of_one.append(parameter)
                self.parameters.append(of_one)

    def set(self, number: int) -> None:
        self.model.set_adapter(str(number))


def _lora_config(spec: LoraSpec) -> LoraConfig:
    targets = _ATTENTION * spec.train_attn + _MLP * spec.train_mlp + ["lm_head"] * spec.train_unembed
    return LoraConfig(r=spec.rank, lora_alpha=int(LORA_ALPHA), target_modules=targets, bias="none")


def adamw(parameters: Sequence[torch.nn.Parameter], fused: bool | None = None) -> torch.optim.AdamW:
    """``fused`` None is torch's default."""
    betas = (_ADAM.beta1, _ADAM.beta2)
    return torch.optim.AdamW(
        parameters, lr=_ADAM.learning_rate, betas=betas, eps=_ADAM.eps, weight_decay=_ADAM.weight_decay, fused=fused
    )


class PeftStep:
    """One tenant after another: set its adapter, pad its data, forward, backward, its own AdamW."""

    def __init__(self, base: BaseModel, workload: Training, autocast: bool) -> None:
        states = list(adapter_states(decoder_config(base), workload.spec, len(workload.tenants)))
        self._adapters = PeftAdapters(transformers_model(base), states)
        self._optimizers = [adamw(parameters) for parameters in self._adapters.parameters]
        self._tenants = workload.tenants
        self._autocast = autocast

    def warm_up(self) -> Figures:
        """The first tenant's gradients, without a step."""
        loss = self._backward(0)
        self._optimizers[0].zero_grad()
        return {"loss": [loss]}

    def measured(self) -> Figures:
        began, optimizer = time.perf_counter(), 0.0
        for number in range(len(self._tenants)):
            self._backward(number)
            computed = time.perf_counter()
            self._optimizers[number].step()
            self._optimizers[number].zero_grad()
            optimizer += time.perf_counter() - computed
        return {"seconds": [time.perf_counter() - began], "optimizer": [optimizer]}

    def _backward(self, number: int) -> float:
        self._adapters.set(number)
        data = self._tenants[number]
        length = max(datum.num_tokens for datum in data)
        tokens_BL = _padded([datum.tokens_T for datum in data], length)
        targets_M = _padded([datum.loss_fn_inputs["target_tokens"] for datum in data], length).flatten()
        weights_M = _padded([datum.loss_fn_inputs["weights"] for datum in data], length).flatten()
        mask_BL = None
        if any(datum.num_tokens < length for datum in data):
            mask_BL = _padded([np.ones(datum.num_tokens, np.int64) for datum in data], length)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._autocast):
            output = self._adapters.model(input_ids=tokens_BL, attention_mask=mask_BL, use_cache=False)
        logits_MV = output.logits.flatten(0, 1)
        loss = (F.cross_entropy(logits_MV.float(), targets_M, reduction="none") * weights_M).sum()
        loss.backward()
        return loss.item()


def _padded(arrays: Sequence[np.ndarray], length: int) -> Tensor:
    return torch.stack([F.pad(torch.as_tensor(array), (0, length - len(array))) for array in arrays])


@contextmanager
def peft_training(base: BaseModel, workloads: Mapping[str, Training], autocast: bool) -> Iterator[Compute]:
    steps: dict[str, PeftStep] = {}

    def compute(case: str, warm_up: bool) -> Figures:
        if not warm_up:
            return steps[case].measured()
        steps.clear()
        steps[case] = PeftStep(base, workloads[case], autocast)
        return steps[case].warm_up()

    yield compute


@contextmanager
def torch_optimizers(base: BaseModel, workloads: Mapping[str, Optimizer], fused: bool | None) -> Iterator[Compute]:
    """One AdamW object a run, over parameters as peft makes them."""
    config = decoder_config(base)
    runs: list[list[torch.nn.Parameter]] = []
    optimizers: list[torch.optim.AdamW] = []

    def compute(case: str, warm_up: bool) -> Figures:
        if warm_up:
            states = adapter_states(config, workloads[case].spec, workloads[case].num_runs)
            runs[:] = [[torch.nn.Parameter(torch.tensor(w)) for w in state.weights.values()] for state in states]
            optimizers[:] = [adamw(parameters, fused) for parameters in runs]
        seconds = []
        for _ in range(SHORT_REPEATS):
            for parameter in itertools.chain(*runs):
                parameter.grad = torch.randn_like(parameter)
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}

    yield compute


# --- transformers.generate --------------------------------------------------------------------------------------------


@contextmanager
def generate(
    base: BaseModel, workloads: Mapping[str, Sampling], dtype: torch.dtype, text: Text, spec: LoraSpec | None
) -> Iterator[Compute]:
    """One batch, pure sampling at temperature 1; with ``spec`` under peft, one adapter for all sequences."""
    model = transformers_model(base, dtype)
    if spec is not None:
        model = PeftAdapters(model, list(adapter_states(decoder_config(base), spec, 1))).model
    model.eval()
    model.generation_config.eos_token_id = None  # no sequence ends early
    texts = texts_of(text, workloads)

    def compute(case: str, warm_up: bool) -> Figures:
        workload = workloads[case]
        num_new = 4 if warm_up else workload.num_new
        config = GenerationConfig(
            max_new_tokens=num_new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=workload.num_samples,
            eos_token_id=None,
            pad_token_id=0,
        )
        prompts_BL = torch.as_tensor(np.stack(workload.prompts(texts[case])))
        began = time.perf_counter()
        with torch.inference_mode():
            tokens_BL = model.generate(
                input_ids=prompts_BL, attention_mask=torch.ones_like(prompts_BL), generation_config=config
            )
        seconds = time.perf_counter() - began
        assert tokens_BL.shape == (workload.num_sequences, workload.num_prompt + num_new), tokens_BL.shape
        return {"seconds": [seconds]}

    yield compute
