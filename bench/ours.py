"""This engine's part of the benchmarks: trainer, optimizer and sampler as ``engine.loaded`` makes them.

Shape letter: ``P`` an adapter's parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bench import kernels
from bench.measure import SHORT_REPEATS, Compute, Figures
from bench.workloads import (
    BaseModel,
    Optimizer,
    Sampling,
    Text,
    Training,
    adapter_states,
    texts_of,
    tokenizer_dir,
)
from tuft.engine.base import BaseModelSource, EngineSettings, RunLoss, Sample
from tuft.engine.device import keep_freed_memory
from tuft.engine.loaded import LoadedModel, load_models
from tuft.engine.optim import optim_steps
from tuft.engine.trainer import Trainer
from tuft.models.decoder import Precision
from tuft.models.kernels import build
from tuft.models.lora import Adapter
from tuft.prefixes import Cut, cut
from tuft.types import (
    AdamParams,
    Datum,
    LoraSpec,
    LossResult,
    OptimStepResult,
    SampleResult,
    SampleSpec,
    SamplingParams,
)

SETTINGS = EngineSettings()


def load(base: BaseModel, precision: Precision) -> LoadedModel:
    """As the engine's process has it."""
    keep_freed_memory()
    source = BaseModelSource(base.name, base.path, tokenizer_dir(base), precision=precision)
    (model,) = load_models([source], SETTINGS)
    cache = kernels.compiled()
    if cache is not None:
        model.decoder.ops = build.load(cache)
    return model


def adapters_of(model: LoadedModel, spec: LoraSpec, count: int, trainable: bool) -> dict[str, Adapter]:
    """Named "0", "1", ..."""
    shapes, device = model.info.linear_shapes, model.decoder.device
    states = adapter_states(model.decoder.config, spec, count)
    return {str(n): Adapter.from_state(shapes, state, device, trainable) for n, state in enumerate(states)}


# --- training ---------------------------------------------------------------------------------------------------------


def passes_of(workload: Training, max_rows: int, share_prefixes: bool = True) -> list[list[RunLoss]]:
    """The tenants' operations, cut as the service cuts them, and their parts filled into passes in order."""
    passes: list[list[RunLoss]] = []
    num_rows = 0
    for number, data in enumerate(workload.tenants):
        cuts = cut([datum.tokens_T for datum in data], max_rows) if share_prefixes else _cut_apart(data, max_rows)
        for piece in cuts:
            part = RunLoss(
                str(number),
                tuple(data[index] for index in piece.numbers),
                "cross_entropy",
                operation_id=str(number),
                first_datum=piece.first,
                datum_numbers=piece.numbers,
                is_last=piece is cuts[-1],
            )
            num_rows += piece.num_rows
            if not passes or num_rows > max_rows:
                passes.append([])
                num_rows = piece.num_rows
            passes[-1].append(part)
    return passes


def _cut_apart(data: Sequence[Datum], max_rows: int) -> list[Cut]:
    """As ``tuft.prefixes.cut`` where no sequence shares anything."""
    cuts: list[Cut] = []
    for index, datum in enumerate(data):
        if cuts and cuts[-1].num_rows + datum.num_tokens <= max_rows:
            last = cuts[-1]
            cuts[-1] = Cut(last.first, (*last.numbers, index), last.num_rows + datum.num_tokens)
        else:
            cuts.append(Cut(index, (index,), datum.num_tokens))
    return cuts


class Step:
    """forward_backward and optim_step of all tenants of a workload, on adapters of its own."""

    def __init__(self, model: LoadedModel, workload: Training, share_prefixes: bool) -> None:
        rows = SETTINGS.micro_batch_tokens
        self._trainer = model.trainer if share_prefixes else Trainer(model.decoder, rows, share_prefixes=False)
        self._adapters = adapters_of(model, workload.spec, len(workload.tenants), trainable=True)
        self._passes = passes_of(workload, rows, share_prefixes)

    def warm_up(self) -> Figures:
        """The passes of the first tenant and whoever shares them, without a step; ``loss`` is the first tenant's."""
        count = 1 + max(n for n, parts in enumerate(self._passes) if any(part.adapter_id == "0" for part in parts))
        losses = self._run(self._passes[:count])
        for adapter_id, adapter in self._adapters.items():
            self._trainer.forget(adapter_id)  # it may have been cut short
            adapter.gradients_P = None
        return {"loss": [losses["0"]]}

    def measured(self) -> Figures:
        began = time.perf_counter()
        self._run(self._passes)
        computed = time.perf_counter()
        for result in optim_steps([(adapter, AdamParams()) for adapter in self._adapters.values()]):
            assert isinstance(result, OptimStepResult), result
        ended = time.perf_counter()
        return {"seconds": [ended - began], "optimizer": [ended - computed]}

    def _run(self, passes: Sequence[Sequence[RunLoss]]) -> dict[str, float]:
        """``loss:sum`` of every tenant whose last part was among them."""
        losses = {}
        for parts in passes:
            for index, result in self._trainer.run(parts, self._adapters):
                if parts[index].is_last:
                    assert isinstance(result, LossResult), result
                    losses[parts[index].adapter_id] = result.metrics["loss:sum"]
                else:
                    assert result is None, result
        return losses


@contextmanager
def training(
    base: BaseModel, workloads: Mapping[str, Training], precision: Precision, share_prefixes: bool = True
) -> Iterator[Compute]:
    model = load(base, precision)
    steps: dict[str, Step] = {}

    def compute(case: str, warm_up: bool) -> Figures:
        if not warm_up:
            return steps[case].measured()
        steps.clear()  # another case's adapters and gradients
        steps[case] = Step(model, workloads[case], share_prefixes)
        return steps[case].warm_up()

    yield compute


@contextmanager
def optimizer(base: BaseModel, workloads: Mapping[str, Optimizer]) -> Iterator[Compute]:
    model = load(base, "float32")
    adapters: list[Adapter] = []

    def compute(case: str, warm_up: bool) -> Figures:
        if warm_up:
            adapters[:] = adapters_of(model, workloads[case].spec, workloads[case].num_runs, trainable=True).values()
        seconds = []
        for _ in range(SHORT_REPEATS):
            for adapter in adapters:
                adapter.gradients_P = torch.randn_like(adapter.params_P)
            began = time.perf_counter()
            results = optim_steps([(adapter, AdamParams()) for adapter in adapters])
            seconds.append(time.perf_counter() - began)
            assert all(isinstance(result, OptimStepResult) for result in results), results
        return {"seconds": seconds}

    yield compute


# --- sampling ---------------------------------------------------------------------------------------------------------


def samples_of(workload: Sampling, text: Text, base: BaseModel, num_new: int) -> list[Sample]:
    params = SamplingParams(max_tokens=num_new, stop=())
    return [
        Sample(
            base.name,
            str(n % workload.num_adapters) if workload.num_adapters else None,
            SampleSpec(tuple(prompt.tolist()), params, workload.num_samples),
            cache_scope="bench",
        )
        for n, prompt in enumerate(workload.prompts(text))
    ]


@contextmanager
def sampling(
    base: BaseModel, workloads: Mapping[str, Sampling], precision: Precision, spec: LoraSpec, text: Text
) -> Iterator[Compute]:
    """``decode_step``: the median step in seconds; nearly all of them are one token of every sequence and no prompt."""
    model = load(base, precision)
    num_adapters = max(workload.num_adapters for workload in workloads.values())
    adapters = adapters_of(model, spec, num_adapters, trainable=False)
    texts = texts_of(text, workloads)

    def compute(case: str, warm_up: bool) -> Figures:
        workload = workloads[case]
        num_new = 4 if warm_up else workload.num_new
        began = time.perf_counter()
        for key, command in enumerate(samples_of(workload, texts[case], base, num_new)):
            model.sampler.add(key, command, adapters[command.adapter_id] if command.adapter_id else None)
        steps, num_tokens = [], 0
        while model.sampler.active:
            step_began = time.perf_counter()
            outcomes = model.sampler.step()
            steps.append(time.perf_counter() - step_began)
            for _, result in outcomes:
                assert isinstance(result, SampleResult), result
                num_tokens += sum(len(sequence.tokens_N) for sequence in result.sequences)
        seconds = time.perf_counter() - began
        assert num_tokens == workload.num_sequences * num_new, num_tokens
        return {"seconds": [seconds], "decode_step": [sorted(steps)[len(steps) // 2]]}

    yield compute
