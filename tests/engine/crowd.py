"""Lives of runs in an engine process, several at once in random order, each written down to the last bit.

A life is what one client sends: operations of one part or several, steps of its optimizer, samples, each turn only once
those before it are sent. What comes of it must not depend on who else lives there.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from tuft.engine.base import (
    BaseModelSource,
    CancelSample,
    CheckCustomLoss,
    Command,
    CopyAdapter,
    CreateAdapter,
    DropAdapter,
    EngineSettings,
    ExportAdapter,
    OptimStep,
    RunLoss,
    Sample,
)
from tuft.engine.worker import EngineProcess
from tuft.errors import TuftError
from tuft.losses import LOSS_SIGNATURES
from tuft.prefixes import cut
from tuft.types import (
    AdamParams,
    AdapterState,
    Datum,
    DimuonParams,
    LoraSpec,
    OptimizerParams,
    PromptScoring,
    SampleSpec,
    SamplingParams,
)

TIMEOUT_S = 120.0
RANKS = (1, 8, 32)
_TURNS_AHEAD = 6
"""So many turns of a life are with the engine before the first of them is answered."""


def started(source: BaseModelSource, settings: EngineSettings) -> EngineProcess:
    engine = EngineProcess([source], settings)
    engine.start()
    engine.wait_ready(TIMEOUT_S)
    return engine


@dataclass(frozen=True)
class Life:
    """``turns``: commands that are sent together."""

    adapter_id: str
    turns: tuple[tuple[Command, ...], ...]


@dataclass(frozen=True)
class Shape:
    """What lives on an engine are made for."""

    base_model: str
    vocab_size: int
    pass_tokens: int
    max_prompt: int = 150
    num_turns: int = 12


def life(shape: Shape, number: int) -> Life:
    """The life of that number, the same whenever it is asked for."""
    rng = np.random.default_rng(number)
    name = f"run-{number}"
    dimuon = number % 3 == 2
    spec = LoraSpec(
        rank=int(rng.choice(RANKS)),
        seed=number,
        train_attn=number % 4 != 1,
        train_mlp=number % 4 != 2,
        train_unembed=number % 2 == 0,
    )
    first = CreateAdapter(name, shape.base_model, spec, "dimuon" if dimuon else "adamw")
    turns: list[tuple[Command, ...]] = [(first,)]
    for turn in range(shape.num_turns):
        turns += _turns(shape, name, turn, dimuon, rng)
    turns.append((ExportAdapter(name, with_optimizer=True),))
    return Life(name, tuple(turns))


def _turns(shape: Shape, name: str, turn: int, dimuon: bool, rng: np.random.Generator) -> list[tuple[Command, ...]]:
    export = (ExportAdapter(name, with_optimizer=True),)
    match int(rng.integers(0, 8)):
        case 0 | 1 | 2 | 3:
            return [(part,) for part in _operation(shape, name, turn, rng)] + [export] * int(rng.integers(0, 2))
        case 4 | 5:
            return [(OptimStep(name, _step(dimuon, rng)),), export]
        case 6:
            return [(_sample(shape, name, rng),)]
        case _:
            frozen = f"{name}-frozen-{turn}"
            return [(CopyAdapter(name, frozen), _sample(shape, frozen, rng)), (_sample(shape, frozen, rng),)]


def _operation(shape: Shape, name: str, turn: int, rng: np.random.Generator) -> list[RunLoss]:
    limit = shape.pass_tokens
    how_many = int(rng.integers(1, 6))
    match int(rng.integers(0, 5)):
        case 0:
            lengths = [int(length) for length in rng.integers(1, 4, how_many)]
        case 1:  # several parts
            lengths = [int(length) for length in rng.integers(limit // 3, limit, 3)]
        case 2:  # more than a pass by itself
            lengths = [limit + 17]
        case _:
            lengths = [int(length) for length in rng.integers(1, limit // 2, how_many)]
    loss_fn = str(rng.choice(list(LOSS_SIGNATURES)))
    beginning = rng.integers(0, shape.vocab_size, 48 if rng.integers(0, 3) == 0 else 0)
    data = tuple(_datum(shape, length, beginning, loss_fn, rng) for length in lengths)
    backward = bool(rng.integers(0, 5))
    cuts = cut([datum.tokens_T for datum in data], limit)
    return [
        RunLoss(
            name,
            tuple(data[index] for index in piece.numbers),
            loss_fn,
            backward=backward,
            operation_id=f"{name}-{turn}",
            first_datum=piece.first,
            datum_numbers=piece.numbers,
            is_last=piece is cuts[-1],
        )
        for piece in cuts
    ]


def _datum(shape: Shape, length: int, beginning: np.ndarray, loss_fn: str, rng: np.random.Generator) -> Datum:
    tokens_T = np.concatenate([beginning, rng.integers(0, shape.vocab_size, length)])
    size = (len(tokens_T), 3) if loss_fn == "cross_entropy" and rng.integers(0, 6) == 0 else (len(tokens_T),)
    inputs: dict[str, np.ndarray] = {"target_tokens": rng.integers(0, shape.vocab_size, size)}
    for wanted in LOSS_SIGNATURES[loss_fn].inputs:
        inputs[wanted] = rng.normal(-3 if wanted == "logprobs" else 0, 1, size).astype(np.float32)
    if loss_fn == "cross_entropy" and rng.integers(0, 2):
        inputs["weights"] = (rng.normal(1, 1, size) * (rng.random(size) > 0.4)).astype(np.float32)
    return Datum(tokens_T, inputs)


def _step(dimuon: bool, rng: np.random.Generator) -> OptimizerParams:
    clip = float(rng.choice([0.0, 1.0]))
    if dimuon:
        return DimuonParams(learning_rate=float(rng.choice([1e-3, 1e-2])), grad_clip_norm=clip)
    return AdamParams(float(rng.choice([1e-4, 1e-3])), weight_decay=float(rng.choice([0.0, 0.1])), grad_clip_norm=clip)


def _sample(shape: Shape, adapter_id: str | None, rng: np.random.Generator) -> Sample:
    common = np.random.default_rng(7).integers(3, shape.vocab_size, 140)
    own = rng.integers(3, shape.vocab_size, int(rng.integers(1, 30)))
    prompt = np.concatenate([common, own])[-int(rng.integers(1, shape.max_prompt)) :]
    if rng.integers(0, 2):
        prompt = np.concatenate([common, own])  # begins like others: found in the cache, or not
    params = SamplingParams(
        max_tokens=int(rng.integers(1, 24)),
        seed=int(rng.integers(0, 1000)),
        stop=(),
        temperature=float(rng.choice([0.0, 0.7, 1.0])),
        top_k=int(rng.choice([-1, 5, 50])),
        top_p=float(rng.choice([1.0, 0.9])),
    )
    scoring = PromptScoring(logprobs=True, topk=3) if rng.integers(0, 2) else PromptScoring()
    topk = 4 if rng.integers(0, 3) == 0 else 0
    spec = SampleSpec(tuple(prompt.tolist()), params, int(rng.choice([1, 3])), topk, scoring)
    return Sample(
        shape.base_model, adapter_id, spec, cache_scope="tenant" if rng.integers(0, 2) else f"of-{adapter_id}"
    )


def poisoned(shape: Shape, number: int) -> Life:
    """A life that sends what no model can compute, and makes its adapter diverge."""
    rng = np.random.default_rng(number)
    name = f"poisoned-{number}"
    turns: list[tuple[Command, ...]] = [(CreateAdapter(name, shape.base_model, LoraSpec(rank=8, seed=number)),)]
    for turn in range(3 * shape.num_turns):
        turns.append(_poison(shape, name, turn, rng))
    return Life(name, tuple(turns))


def _poison(shape: Shape, name: str, turn: int, rng: np.random.Generator) -> tuple[Command, ...]:
    loss_fn = str(rng.choice(["cross_entropy", "ppo", "gspo"]))
    datum = _datum(shape, int(rng.integers(1, 40)), np.zeros(0, np.int64), loss_fn, rng)
    inputs = dict(datum.loss_fn_inputs)
    match int(rng.integers(0, 8)):
        case 0:  # a token that is none
            tokens_T = datum.tokens_T.copy()
            tokens_T[-1] = rng.choice([-1, shape.vocab_size, 2**40])
            datum = Datum(tokens_T, inputs)
        case 1:
            inputs["target_tokens"] = inputs["target_tokens"] + shape.vocab_size
            datum = Datum(datum.tokens_T, inputs)
        case 2 | 3:  # numbers that are none, or that overflow
            which = "weights" if loss_fn == "cross_entropy" else "advantages"
            bad = rng.choice([np.nan, np.inf, 3e38]).astype(np.float32)
            inputs[which] = np.full(inputs["target_tokens"].shape, bad)
            datum = Datum(datum.tokens_T, inputs)
        case 4:
            return (OptimStep(name, AdamParams(learning_rate=float(rng.choice([1e3, 1e18, 3e38])))),)
        case 5:  # a prompt that is none, or weights that have diverged
            prompt = (3, int(rng.choice([-1, shape.vocab_size, 7])))
            params = SamplingParams(max_tokens=8, seed=1, temperature=float(rng.choice([0.0, 1.0, 1e-30])))
            frozen = f"{name}-frozen-{turn}"
            return CopyAdapter(name, frozen), Sample(shape.base_model, frozen, SampleSpec(prompt, params), "tenant")
        case 6:
            return (ExportAdapter(name, with_optimizer=True), OptimStep(name, DimuonParams(learning_rate=1.0)))
    return (RunLoss(name, (datum,), loss_fn, operation_id=f"{name}-{turn}"),)


# --- living -----------------------------------------------------------------------------------------------------------

OTHERS = CancelSample | CheckCustomLoss
"""Commands that are of no adapter."""

Record = list[str]
"""One line a command: what it was, and a digest of its reply."""


def live(engine: EngineProcess, lives: Sequence[Life], seed: int = 0, pause_s: float = 0.004) -> dict[str, Record]:
    """All ``lives`` at once: whose turn is next, what is sent together and after which pause is random."""
    order = random.Random(seed)
    replies: dict[str, list[tuple[Command, Future[Any]]]] = {one.adapter_id: [] for one in lives}
    left = {one.adapter_id: list(one.turns) for one in lives}
    while any(left.values()):
        ready = [name for name, turns in left.items() if turns and _num_open(replies[name]) < _TURNS_AHEAD]
        chosen = order.sample(ready, order.randint(1, len(ready))) if ready else []
        turns = [(name, command) for name in chosen for command in left[name].pop(0)]
        for (name, command), future in zip(turns, engine.submit([command for _, command in turns]), strict=True):
            replies[name].append((command, future))
        if order.random() < 0.7 or not ready:
            time.sleep(order.random() * pause_s)
    records = {name: [_line(command, future) for command, future in sent] for name, sent in replies.items()}
    for one in lives:
        names = {command.adapter_id for turn in one.turns for command in turn if not isinstance(command, OTHERS)}
        for future in engine.submit([DropAdapter(name) for name in names if name is not None]):
            future.result(TIMEOUT_S)
    return records


def state_after(engine: EngineProcess, life: Life, num_turns: int) -> AdapterState:
    """The run's state once its first turns are over."""
    for turn in life.turns[:num_turns]:
        for future in engine.submit(turn):
            future.result(TIMEOUT_S)
    (state,) = [future.result(TIMEOUT_S) for future in engine.submit([ExportAdapter(life.adapter_id, True)])]
    assert isinstance(state, AdapterState)
    engine.submit([DropAdapter(life.adapter_id)])
    return state


def _num_open(sent: Sequence[tuple[Command, Future[Any]]]) -> int:
    return sum(not future.done() for _, future in sent)


def _line(command: Command, future: Future[Any]) -> str:
    error = future.exception(TIMEOUT_S)
    if isinstance(error, TuftError):
        return f"{type(command).__name__}: {error}"
    return f"{type(command).__name__}: {digest(future.result())}"


def digest(reply: object) -> str:
    """Of every bit of it, but for how much of a prompt was in the cache."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if is_dataclass(value):
            for one in fields(value):
                if one.name != "prompt_cache_hit_tokens":
                    add(getattr(value, one.name))
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(reply)
    return found.hexdigest()[:16]


def differences(actual: Record, expected: Record) -> list[str]:
    assert len(actual) == len(expected)
    return [
        f"{n}: {mine} != {theirs}"
        for n, (mine, theirs) in enumerate(zip(actual, expected, strict=True))
        if mine != theirs
    ]
