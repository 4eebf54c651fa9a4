"""What is noted of every request as it goes: a span on its session's trace, and what it used once it is settled."""

from __future__ import annotations

from typing import Any

from tuft.engine.base import OptimStep, RunLoss
from tuft.records import Run, SamplerInfo
from tuft.service.queue import Work
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

    def __init__(self, traces: Traces, usage: Usage) -> None:
        self._traces = traces
        self._usage = usage

    def operation(self, run: Run, seq: int, name: str, work: Work) -> Span:
        """An operation of a run is queued."""
        args: dict[str, Any] = {"seq": seq}
        if isinstance(work, RunLoss):
            args |= {"loss_fn": work.loss_fn, "num_data": len(work.data), "num_tokens": work.num_tokens}
        elif isinstance(work, OptimStep):
            args["learning_rate"] = work.params.learning_rate
        span = Span(run.tenant_id, run.session_id, run.base_model, run.run_id, name, args)
        self._traces.add(span)
        return span

    def sample(self, sampler: SamplerInfo, seq: int, spec: SampleSpec) -> Span:
        """A request of a sampler is queued."""
        args = {"seq": seq, "num_prompt_tokens": len(spec.prompt_tokens), "num_samples": spec.num_samples}
        span = Span(sampler.tenant_id, sampler.session_id, sampler.base_model, sampler.sampler_id, "sample", args)
        self._traces.add(span)
        return span

    def settled(self, span: Span, result: FutureResult | Failure) -> None:
        match result:
            case Failure():
                span.settle(outcome="failed", error=result.message[:_MAX_ERROR])
            case SampleResult():
                num_tokens = sum(len(sequence.tokens_N) for sequence in result.sequences)
                num_cached = result.prompt_cache_hit_tokens
                span.settle(outcome="ok", num_cached_tokens=num_cached, num_tokens=num_tokens)
                self._usage.add(span, "prefill_cached", num_cached)
                self._usage.add(span, "prefill", span.args["num_prompt_tokens"] - num_cached)
                self._usage.add(span, "sample", num_tokens)
            case LossResult():
                span.settle(outcome="ok")
                self._usage.add(span, "training", span.args["num_tokens"])
            case WeightsSaved() | ExternalSaved() | SamplerSaved(path=str()):
                span.settle(outcome="ok")
                self._usage.add(span, "checkpoint", 1)
            case _:
                span.settle(outcome="ok")
