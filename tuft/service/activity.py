"""What is noted of every request as it goes: a span on its session's trace, and what it used once it is settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuft.engine.base import OptimStep, RunLoss
from tuft.footprint import checkpoint_bytes
from tuft.metering import Charge, UsageKey
from tuft.records import Run, SamplerInfo
from tuft.service.calls import SaveExternal, SaveForSampler, SaveWeights
from tuft.service.models import BaseModels
from tuft.service.ownership import Ownership
from tuft.service.pace import Pace
from tuft.service.queue import Operation, Work
from tuft.service.traces import Span, Traces
from tuft.service.usage import Usage
from tuft.types import (
    ExternalSaved,
    Failure,
    FutureResult,
    LossResult,
    SampleResult,
    SamplerSaved,
    SampleSpec,
    WeightsSaved,
)

_MAX_ERROR = 300


class Activity:
    """Told of requests by those who queue, start and settle them."""

    def __init__(self, traces: Traces, usage: Usage, pace: Pace, models: BaseModels, ownership: Ownership) -> None:
        self._traces = traces
        self._usage = usage
        self._pace = pace
        self._models = models
        self._ownership = ownership

    def charge(self, run: Run, work: Work) -> Charge:
        """What an operation may use at most."""
        if isinstance(work, RunLoss):
            return Charge(run.base_model, {"training": work.num_tokens})
        if isinstance(work, SaveWeights | SaveExternal) or (isinstance(work, SaveForSampler) and work.name is not None):
            shapes = self._models.require(run.base_model).linear_shapes
            num_bytes = checkpoint_bytes(shapes, run.spec, run.optimizer, with_optimizer=isinstance(work, SaveWeights))
            return Charge(run.base_model, stored_bytes=num_bytes)
        return Charge(run.base_model)

    def sample_charge(self, sampler: SamplerInfo, spec: SampleSpec) -> Charge:
        """The same for a request of a sampler."""
        num_prompt = len(spec.prompt_tokens)
        room = max(1, self._models.require(sampler.base_model).max_context_tokens - num_prompt)
        num_sampled = spec.num_samples * min(spec.params.max_tokens or room, room)
        return Charge(sampler.base_model, {"prefill": num_prompt, "sample": num_sampled})

    def operation(self, run: Run, operation: Operation) -> Span:
        """An operation of a run is queued."""
        work = operation.work
        args: dict[str, Any] = {"seq": operation.seq}
        if isinstance(work, RunLoss):
            args |= {"loss_fn": work.loss_fn, "num_data": len(work.data)}
        elif isinstance(work, OptimStep):
            args["learning_rate"] = work.params.learning_rate
        if operation.is_loss:
            args["num_tokens"] = operation.num_tokens
        span = Span(run.tenant_id, run.session_id, run.base_model, run.run_id, operation.name, args)
        span.key_number = operation.key_number
        self._traces.add(span)
        return span

    def sample(self, sampler: SamplerInfo, seq: int, spec: SampleSpec, key_number: int) -> Span:
        """A request of a sampler is queued, by that API key."""
        args = {"seq": seq, "num_prompt_tokens": len(spec.prompt_tokens), "num_samples": spec.num_samples}
        span = Span(sampler.tenant_id, sampler.session_id, sampler.base_model, sampler.sampler_id, "sample", args)
        span.key_number = key_number
        self._traces.add(span)
        return span

    def settled(self, span: Span, result: FutureResult | Failure) -> Mapping[UsageKey, int]:
        """The request has ended. Returns what it used, which the ledger gets together with the result."""
        used: dict[str, int] = {}
        match result:
            case Failure():
                error = result.message[:_MAX_ERROR].encode(errors="replace").decode()  # JSON holds no lone surrogate
                span.settle(outcome="failed", error=error)
                if result.refused is not None:
                    self._ownership.refused(result.refused, span.name, span.tenant_id)
            case SampleResult():
                num_tokens = sum(len(sequence.tokens_N) for sequence in result.sequences)
                num_cached = result.prompt_cache_hit_tokens
                num_prefilled = span.args["num_prompt_tokens"] - num_cached
                span.settle(outcome="ok", num_cached_tokens=num_cached, num_tokens=num_tokens)
                used = {"prefill_cached": num_cached, "prefill": num_prefilled, "sample": num_tokens}
            case LossResult():
                used = {"training": span.args["num_tokens"]}
                span.settle(outcome="ok")
                if span.started_s is not None and span.settled_s is not None:
                    self._pace.trained(span.base_model, used["training"], span.started_s, span.settled_s)
            case WeightsSaved() | ExternalSaved() | SamplerSaved(path=str()):
                span.settle(outcome="ok")
                used = {"checkpoint": 1}
            case _:
                span.settle(outcome="ok")
        return self._usage.of(span, used)
