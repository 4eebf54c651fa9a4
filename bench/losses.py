"""What each loss costs beside cross_entropy, and a step of dimuon beside one of AdamW.

One engine, one adapter, 8 sequences of 128 tokens of which the second half counts as sampled; a forward_backward of
every loss in turn, so that a round's figures are neighbours. ``custom`` is importance_sampling as a client writes it:
traced by the SDK, run by the engine's interpreter. Losses that need a whole datum (gspo, custom) score it twice.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from bench import ours
from bench.report import arguments, publish, table
from bench.workloads import BaseModel, Text
from tuft.engine.base import RunLoss
from tuft.engine.loaded import LoadedModel
from tuft.engine.optim import optim_steps
from tuft.losses import LOSS_SIGNATURES, CustomLoss
from tuft.models.lora import Adapter
from tuft.types import AdamParams, Datum, DimuonParams, LoraSpec, LossResult, OptimStepResult

MODULE = "bench.losses"
NUM_SEQUENCES, LENGTH = 8, 128
RANKS = (8, 32)
OPTIMIZERS = {"adamw": AdamParams(), "dimuon": DimuonParams(learning_rate=1e-3)}


def custom_loss() -> CustomLoss:
    def loss(
        logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, pull: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -(torch.exp(logprobs - sampled_logprobs) * pull).sum(), {}

    ranks = {"logprobs": 1, "sampled_logprobs": 1, "pull": 1}
    handle = trace_loss(loss, ranks, "bench")  # type: ignore[arg-type]  # a literal for a TypeAlias
    nodes = [node.model_dump() for node in encode_graph(handle).nodes]
    return CustomLoss("bench", tuple(ranks.items()), json.dumps(nodes))


def data_of(text: Text, compute: Callable[[tuple[Datum, ...]], LossResult]) -> tuple[Datum, ...]:
    """With the inputs of every loss; ``compute`` tells the logprobs at which the targets are taken to be sampled."""
    is_sampled = np.arange(LENGTH) >= LENGTH // 2
    data = []
    for _ in range(NUM_SEQUENCES):
        tokens = text.take(LENGTH + 1)
        data.append(Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": np.float32(is_sampled)}))
    found = []
    for number, (datum, logprobs_T) in enumerate(zip(data, compute(tuple(data)).logprobs, strict=True)):
        advantages_T = np.float32(is_sampled) * (1 if number % 2 else -1)
        policy = {"logprobs": np.where(is_sampled, logprobs_T, np.float32(0)), "advantages": advantages_T}
        marks = {"sequence_ratio_mask": np.float32(is_sampled), "is_sampled": np.float32(is_sampled)}
        ours_too = {"sampled_logprobs": policy["logprobs"], "pull": advantages_T}
        found.append(Datum(datum.tokens_T, {**datum.loss_fn_inputs, **policy, **marks, **ours_too}))
    return tuple(found)


def inputs_for(loss_fn: str, data: tuple[Datum, ...]) -> tuple[Datum, ...]:
    """What the loss reads, and nothing else."""
    names = ("sampled_logprobs", "pull") if loss_fn == "custom" else LOSS_SIGNATURES[loss_fn].names
    wanted = {"target_tokens", *names}
    return tuple(
        Datum(datum.tokens_T, {name: array for name, array in datum.loss_fn_inputs.items() if name in wanted})
        for datum in data
    )


def loss_seconds(model: LoadedModel, text: Text, rounds: int) -> Mapping[str, list[float]]:
    """Of forward_backward, by loss."""
    (adapter,) = ours.adapters_of(model, LoraSpec(rank=8, train_unembed=False), 1, trainable=True).values()

    def compute(data: tuple[Datum, ...], loss_fn: str = "cross_entropy", backward: bool = True) -> LossResult:
        custom = custom_loss() if loss_fn == "custom" else None
        part = RunLoss("0", inputs_for(loss_fn, data), loss_fn, backward=backward, custom_loss=custom)
        ((_, result),) = model.trainer.run([part], {"0": adapter})
        adapter.gradients_P = None
        assert isinstance(result, LossResult), result
        return result

    data = data_of(text, lambda data: compute(data, backward=False))
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for loss_fn in (*LOSS_SIGNATURES, "custom"):
            began = time.perf_counter()
            compute(data, loss_fn)
            if number:  # the first round warms up
                seconds[loss_fn].append(time.perf_counter() - began)
    return seconds


def optimizer_seconds(model: LoadedModel, rounds: int) -> Mapping[tuple[int, str], list[float]]:
    """Of optim_step, by rank and family."""
    seconds: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    shapes = model.info.linear_shapes
    adapters = {
        (rank, family): Adapter.initialised(shapes, LoraSpec(rank=rank, seed=1), model.decoder.device, family)
        for rank in RANKS
        for family in OPTIMIZERS
    }
    for number in range(rounds + 1):
        for (rank, family), adapter in adapters.items():
            adapter.gradients_P = torch.randn_like(adapter.params_P)
            began = time.perf_counter()
            (result,) = optim_steps([(adapter, OPTIMIZERS[family])])
            assert isinstance(result, OptimStepResult), result
            if number:
                seconds[rank, family].append(time.perf_counter() - began)
    return seconds


def ratio(over: list[float], under: list[float]) -> str:
    """Median of the ratios of neighbours."""
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f} x"


def main() -> None:
    options = arguments(MODULE, __doc__, rounds=5).parse_args()
    base = BaseModel.embedded()
    model = ours.load(base, "bf16")
    losses = loss_seconds(model, Text.of_chats(base, options.chats), options.rounds)
    steps = optimizer_seconds(model, options.rounds)
    tokens = NUM_SEQUENCES * LENGTH
    of_losses = [
        (name, f"{statistics.median(seconds):.3f}", f"{tokens / statistics.median(seconds):.0f}",
         ratio(seconds, losses["cross_entropy"]))
        for name, seconds in losses.items()
    ]  # fmt: skip
    of_steps = [
        (rank, family, f"{1e3 * statistics.median(seconds):.1f}", ratio(seconds, steps[rank, "adamw"]))
        for (rank, family), seconds in steps.items()
    ]
    sections = [
        f"{base.name}, bf16, {NUM_SEQUENCES} x {LENGTH} tokens, LoRA rank 8. Medians of {options.rounds} rounds in "
        "which the losses took turns; ratios are of neighbours.",
        table(("loss", "s (median)", "tokens/s", "over cross_entropy"), of_losses),
        "optim_step of one run, all linear layers and the head:",
        table(("rank", "optimizer", "ms (median)", "over AdamW"), of_steps),
    ]
    publish(MODULE, "Losses and optimizers", sections, options.markdown)


if __name__ == "__main__":
    main()
