"""One training step (forward, backward, AdamW) of the embedded SmolLM2-135M: this engine beside transformers + peft.

    python -m bench.train_step [--rounds 5] [--rank 8] [--sequences 4] [--tokens 256]

Every variant runs in a process of its own, as its users would have it, with the same weights, adapter and batch; the
variants take turns, and a round's figures stand beside each other. ``floor`` replays the base model's matrix products
alone, in bf16 and at the same shapes: what no engine on this machine can beat.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tests.engine.reference import (
    CPU,
    PeftReference,
    random_adapter_state,
    smollm2_transformers,
    smollm2_weights,
)
from tuft.engine.base import RunLoss
from tuft.engine.device import keep_freed_memory
from tuft.engine.optim import optim_step
from tuft.engine.trainer import Trainer
from tuft.models.decoder import Decoder, Precision
from tuft.models.head import MAX_CHUNK_ROWS
from tuft.models.lora import Adapter
from tuft.types import AdamParams, Datum, LoraSpec, LossResult

Step = Callable[[], float]
"""Computes one step and returns its loss."""


@dataclass(frozen=True)
class Workload:
    rank: int
    sequences: int
    tokens: int
    train_unembed: bool

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(rank=self.rank, seed=0, train_unembed=self.train_unembed)

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.tokens

    def data(self) -> tuple[Datum, ...]:
        """Random tokens; the second half of every sequence is trained on."""
        rng = np.random.default_rng(0)
        weights_T = (np.arange(self.tokens) >= self.tokens // 2).astype(np.float32)
        return tuple(
            Datum(
                rng.integers(0, 49_152, self.tokens),
                {"target_tokens": rng.integers(0, 49_152, self.tokens), "weights": weights_T},
            )
            for _ in range(self.sequences)
        )


def floor(workload: Workload) -> Step:
    """Forward and input-gradient products of all layers; the head forward for every row, backward for every other."""
    config = smollm2_weights().config
    kv = 2 * config.num_kv_heads * config.head_dim
    q, hidden, inner = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size
    shapes = [(q + kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)] * config.num_layers
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    head = torch.randn(config.vocab_size, hidden, dtype=torch.bfloat16)
    rows = {size: torch.randn(workload.num_tokens, size, dtype=torch.bfloat16) for shape in shapes for size in shape}
    chunk = torch.randn(MAX_CHUNK_ROWS, hidden, dtype=torch.bfloat16)
    dlogits = torch.randn(MAX_CHUNK_ROWS, config.vocab_size, dtype=torch.bfloat16)

    def step() -> float:
        for weight in weights:
            F.linear(rows[weight.shape[1]], weight)
            torch.mm(rows[weight.shape[0]], weight)
        num_chunks = -(-workload.num_tokens // MAX_CHUNK_ROWS)
        for number in range(num_chunks):
            F.linear(chunk, head)
            if number % 2:
                torch.mm(dlogits, head)
        return float("nan")

    return step


def ours(workload: Workload, precision: Precision) -> Step:
    keep_freed_memory()
    decoder = Decoder(smollm2_weights(), precision, CPU)
    state = random_adapter_state(decoder.config, workload.spec, size=0.01)
    adapter = Adapter.from_state(decoder.config.linear_shapes(), state, CPU, trainable=True)
    trainer = Trainer(decoder, micro_batch_tokens=2048)
    operation = RunLoss("a", workload.data(), "cross_entropy")

    def step() -> float:
        ((_, result),) = trainer.run([operation], {"a": adapter})
        assert isinstance(result, LossResult), result
        optim_step(adapter, AdamParams())
        return result.metrics["loss:sum"]

    return step


def peft(workload: Workload, autocast: bool) -> Step:
    state = random_adapter_state(smollm2_weights().config, workload.spec, size=0.01)
    reference = PeftReference(smollm2_transformers(), state)
    optimizer = reference.optimizer(AdamParams())
    data = workload.data()
    tokens_BL = torch.as_tensor(np.stack([datum.tokens_T for datum in data]))
    targets_M = torch.as_tensor(np.concatenate([datum.loss_fn_inputs["target_tokens"] for datum in data]))
    weights_M = torch.as_tensor(np.concatenate([datum.loss_fn_inputs["weights"] for datum in data]))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits_MV = reference.model(input_ids=tokens_BL, use_cache=False).logits.flatten(0, 1)
        loss = (F.cross_entropy(logits_MV.float(), targets_M, reduction="none") * weights_M).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


VARIANTS: dict[str, Callable[[Workload], Step]] = {
    "floor (bf16 products alone)": floor,
    "TuFT bf16": lambda workload: ours(workload, "bf16"),
    "TuFT float32": lambda workload: ours(workload, "float32"),
    "transformers + peft, bf16 autocast": lambda workload: peft(workload, autocast=True),
    "transformers + peft, float32": lambda workload: peft(workload, autocast=False),
}
BASELINE = "transformers + peft, float32"


def serve(name: str, workload: Workload, connection: Connection) -> None:
    """A variant's process: one step a message, after one that warms up and whose loss everyone compares."""
    step = VARIANTS[name](workload)
    connection.send((0.0, step()))
    while connection.recv():
        started = time.perf_counter()
        loss = step()
        connection.send((time.perf_counter() - started, loss))


def measure(workload: Workload, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round and the first step's loss, by variant."""
    context = get_context("spawn")
    ends: dict[str, Connection] = {}
    losses: dict[str, float] = {}
    for name in VARIANTS:
        mine, theirs = context.Pipe()
        context.Process(target=serve, args=(name, workload, theirs), daemon=True).start()
        theirs.close()
        print(f"loading {name}", file=sys.stderr)
        losses[name] = mine.recv()[1]
        ends[name] = mine
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name, end in ends.items():
            end.send(True)
            seconds[name].append(end.recv()[0])
            print(f"round {number + 1}/{rounds}: {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    for end in ends.values():
        end.send(False)
    return seconds, losses


def report(workload: Workload, seconds: dict[str, list[float]], losses: dict[str, float]) -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = medians[BASELINE]
    lines = [
        f"SmolLM2-135M-Instruct, {workload.sequences} x {workload.tokens} random tokens, half of them weighted, "
        f"LoRA rank {workload.rank} on all linear layers{' and the head' if workload.train_unembed else ''}.",
        f"{cpu}, {os.cpu_count()} CPUs, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}, "
        f"commit {commit.stdout.strip()}, `python -m bench.train_step {' '.join(sys.argv[1:])}`".rstrip(),
        "",
        "| variant | s (median) | s (min) | tokens/s | against peft float32 | loss - peft float32 |",
        "|---|---|---|---|---|---|",
    ]
    for name, median in medians.items():
        difference = "" if np.isnan(losses[name]) else f"{losses[name] - losses[BASELINE]:+.4f}"
        lines.append(
            f"| {name} | {median:.3f} | {min(seconds[name]):.3f} | {workload.num_tokens / median:.0f} | "
            f"{baseline / median:.2f}x | {difference} |"
        )
    lines.append(
        f"\nLoss of the first step, peft float32: {losses[BASELINE]:.4f}. Medians of {len(seconds[BASELINE])}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--train-unembed", action="store_true")
    options = parser.parse_args()
    workload = Workload(options.rank, options.sequences, options.tokens, options.train_unembed)
    seconds, losses = measure(workload, options.rounds)
    print(report(workload, seconds, losses))


if __name__ == "__main__":
    main()
