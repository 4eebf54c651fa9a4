"""Supervised fine-tuning on chats, through the Tinker SDK: train a LoRA adapter, watch it learn, hear the difference.

    python examples/chat_sft/chat_sft.py --base-url http://localhost:10610        (key: --api-key or TINKER_API_KEY)

Writes into --out: metrics.jsonl, curves.png, answers.md, and run.json with the tinker:// paths of the saved adapter.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C (what was trained until then is saved).
The guide is docs/guides/chat-sft.md.
"""

from __future__ import annotations

import json
import math
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tinker
from answers import ask, held_out_prompts, show_answers
from conversations import ChatDataset, DatasetError, load_chats
from curves import CURVES_FILE, METRICS_FILE, StepMetrics, append_metrics, plot_curves
from render import TemplateError, to_data
from rich.console import Console
from settings import DEFAULT_STEPS, Settings, parse_settings
from tqdm import tqdm  # the plain bar: it works in a terminal and, without widgets, in Jupyter

console = Console()


def num_steps(settings: Settings, num_train: int) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        return DEFAULT_STEPS
    return max(1, math.ceil(settings.epochs * num_train / settings.batch_size))


def batches(data: Sequence[tinker.Datum], settings: Settings) -> Iterator[list[tinker.Datum]]:
    """`num_steps` batches; every datum once, in a new order, before any comes again."""
    order: list[int] = []
    shuffle = random.Random(settings.seed)
    for _ in range(num_steps(settings, len(data))):
        while len(order) < settings.batch_size:
            order += shuffle.sample(range(len(data)), len(data))
        yield [data[i] for i in order[: settings.batch_size]]
        del order[: settings.batch_size]


# --- training ---------------------------------------------------------------------------------------------------------


def masked_nll(output: tinker.ForwardBackwardOutput, data: Sequence[tinker.Datum]) -> float:
    """sum(-logprob * weight) / sum(weight) over all targets of `data`: nats per assistant token."""
    loss = total_weight = 0.0
    for datum, result in zip(data, output.loss_fn_outputs, strict=True):
        weights = np.array(datum.loss_fn_inputs["weights"].data)
        logprobs = np.array(result["logprobs"].data)
        loss -= float(logprobs @ weights)
        total_weight += float(weights.sum())
    return loss / total_weight


@dataclass(frozen=True, slots=True)
class Submitted:
    """A step whose calls are with the server and whose results have not been read. Step 0 only measures."""

    step: int
    batch: Sequence[tinker.Datum]
    test_data: Sequence[tinker.Datum]
    learning_rate: float
    loss: tinker.APIFuture[tinker.ForwardBackwardOutput] | None
    update: tinker.APIFuture[Any] | None
    test: tinker.APIFuture[tinker.ForwardBackwardOutput] | None


def submit_step(
    client: tinker.TrainingClient,
    step: int,
    batch: Sequence[tinker.Datum],
    test_data: Sequence[tinker.Datum],
    learning_rate: float,
) -> Submitted:
    """Queue one optimizer step and, with `test_data`, the measurement after it. The server keeps the order of the
    calls, so none of them has to be waited for here."""
    loss = client.forward_backward(list(batch), "cross_entropy") if batch else None
    update = client.optim_step(tinker.AdamParams(learning_rate=learning_rate)) if batch else None
    test = client.forward(list(test_data), "cross_entropy") if test_data else None
    return Submitted(step, batch, test_data, learning_rate, loss, update, test)


def read_step(submitted: Submitted, started_s: float, last_s: float) -> StepMetrics:
    """Wait for a step's results."""
    train_nll = masked_nll(submitted.loss.result(), submitted.batch) if submitted.loss else None
    if submitted.update:
        submitted.update.result()
    test_nll = masked_nll(submitted.test.result(), submitted.test_data) if submitted.test else None
    now_s = time.monotonic()
    num_tokens = sum(datum.model_input.length for datum in submitted.batch)
    num_computed = num_tokens + sum(datum.model_input.length for datum in submitted.test_data)
    return StepMetrics(
        step=submitted.step,
        train_nll=train_nll,
        test_nll=test_nll,
        num_tokens=num_tokens,
        tokens_per_s=round(num_computed / (now_s - last_s), 1),
        learning_rate=submitted.learning_rate,
        elapsed_s=round(now_s - started_s, 3),
    )


def train(
    client: tinker.TrainingClient,
    train_data: Sequence[tinker.Datum],
    test_data: Sequence[tinker.Datum],
    settings: Settings,
    interrupt: Interrupt,
) -> Iterator[StepMetrics]:
    """Yield the metrics of step 0 (test only) and then of every optimizer step, in order.

    The next step is submitted before the last one's results are read, so the server always has work. An interrupt
    ends the submitting; what is under way is still finished and yielded.
    """
    total = num_steps(settings, len(train_data))
    started_s = last_s = time.monotonic()
    in_flight = deque([submit_step(client, 0, [], test_data, 0.0)])
    for step, batch in enumerate(batches(train_data, settings), start=1):
        if interrupt.requested:
            break
        measured = test_data if step % settings.eval_every == 0 or step == total else []
        remaining = 1 - (step - 1) / total if settings.schedule == "linear" else 1.0
        in_flight.append(submit_step(client, step, batch, measured, settings.learning_rate * remaining))
        yield read_step(in_flight.popleft(), started_s, last_s)
        last_s = time.monotonic()
    while in_flight:
        yield read_step(in_flight.popleft(), started_s, last_s)
        last_s = time.monotonic()


class Interrupt:
    """While entered, the first Ctrl-C only sets `requested`; a second one raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
        print("\nStopping: the step under way is finished and saved (Ctrl-C again: stop at once)", file=sys.stderr)


def train_with_progress(
    client: tinker.TrainingClient,
    train_data: Sequence[tinker.Datum],
    test_data: Sequence[tinker.Datum],
    settings: Settings,
) -> tuple[list[StepMetrics], bool]:
    """Train, write metrics.jsonl and draw the curves. Returns the history and whether it was interrupted."""
    (settings.out / METRICS_FILE).unlink(missing_ok=True)
    history: list[StepMetrics] = []
    with Interrupt() as interrupt, tqdm(total=num_steps(settings, len(train_data)), unit="step") as bar:
        for row in train(client, train_data, test_data, settings, interrupt):
            append_metrics(settings.out, row)
            history.append(row)
            test = next(past.test_nll for past in reversed(history) if past.test_nll is not None)
            nll = f"train NLL {row.train_nll:.3f}, " if row.train_nll is not None else ""
            bar.set_postfix_str(f"{nll}test NLL {test:.3f}, {row.tokens_per_s:.0f} tokens/s", refresh=False)
            bar.update(min(row.step, 1))
    plot_curves(history, settings.out / CURVES_FILE, f"Chat SFT: rank {settings.rank}, lr {settings.learning_rate:g}")
    return history, interrupt.requested


# --- saving and asking ------------------------------------------------------------------------------------------------


def save(client: tinker.TrainingClient, name: str) -> dict[str, str]:
    """Two checkpoints: `state` to go on training from (weights and Adam's moments), `sampler` to sample with."""
    state = client.save_state(name)
    sampler = client.save_weights_for_sampler(name)
    return {"state": state.result().path, "sampler": sampler.result().path}


# --- the run ----------------------------------------------------------------------------------------------------------


def require_reachable(base_url: str, timeout_s: float = 5.0) -> None:
    """The SDK retries a refused connection for minutes; a wrong URL should be said at once. Raises OSError."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except OSError as error:
        raise OSError(f"no server at {base_url} ({error}); start one with `tuft launch`, or give --base-url") from error


def choose_base_model(settings: Settings) -> str:
    rest = tinker.RestClient(base_url=settings.base_url, api_key=settings.api_key)
    served = [str(model.model_name) for model in rest.get_server_capabilities().result().supported_models]
    if settings.base_model is None:
        return served[0]
    if settings.base_model not in served:
        raise ValueError(f"--base-model: got {settings.base_model!r}; the server has {', '.join(served)}")
    return settings.base_model


def run(settings: Settings, service: tinker.ServiceClient) -> int:
    """The whole example; returns the exit code."""
    base_model = choose_base_model(settings)
    dataset = load_chats(settings.dataset, num_test=settings.num_test, max_train=settings.max_train, seed=settings.seed)
    console.print(f"Base model {base_model}\nData set   {dataset.name}: {dataset.origin}", highlight=False)
    client = service.create_lora_training_client(
        base_model,
        rank=settings.rank,
        seed=settings.seed,
        train_mlp=settings.train_mlp,
        train_attn=settings.train_attn,
        train_unembed=settings.train_unembed,
    ).result()
    tokenizer = client.get_tokenizer()
    train_data = to_data(tokenizer, dataset.train, settings.max_tokens)
    test_data = to_data(tokenizer, dataset.test, settings.max_tokens)
    describe("Train", train_data)
    describe("Test ", test_data)

    prompts = held_out_prompts(dataset)
    console.print("Asking the base model three held-out prompts ...")
    base_sampler = service.create_sampling_client(base_model=base_model).result()
    before = ask(base_sampler, tokenizer, prompts, settings.answer_tokens)

    settings.out.mkdir(parents=True, exist_ok=True)
    history, interrupted = train_with_progress(client, train_data, test_data, settings)
    paths = save(client, f"step-{history[-1].step}")
    write_run(settings, base_model, dataset, history, paths)
    if interrupted:
        console.print(
            f"Stopped after step {history[-1].step}. Saved {paths['state']} and {paths['sampler']}", soft_wrap=True
        )
        return 130

    tuned_sampler = service.create_sampling_client(model_path=paths["sampler"]).result()
    after = ask(tuned_sampler, tokenizer, prompts, settings.answer_tokens)
    show_answers(console, prompts, before, after, settings.out / "answers.md")
    summarize(settings, history, paths)
    return 0


def describe(part: str, data: Sequence[tinker.Datum]) -> None:
    num_tokens = sum(datum.model_input.length for datum in data)
    num_trained = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)
    console.print(f"{part}      {len(data)} conversations, {num_tokens} tokens, {num_trained:.0f} of them answers")


def write_run(
    settings: Settings, base_model: str, dataset: ChatDataset, history: Sequence[StepMetrics], paths: dict[str, str]
) -> None:
    """run.json: what it takes to repeat the run or to go on from it. The key stays out."""
    chosen = {name: value for name, value in asdict(settings).items() if name != "api_key"}
    record = {
        "settings": chosen,
        "base_model": base_model,
        "dataset": {"name": dataset.name, "origin": dataset.origin},
        "last_step": asdict(history[-1]),
        "checkpoints": paths,
    }
    (settings.out / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def summarize(settings: Settings, history: Sequence[StepMetrics], paths: dict[str, str]) -> None:
    tests = [row.test_nll for row in history if row.test_nll is not None]
    console.print(
        f"Test NLL   {tests[0]:.3f} -> {tests[-1]:.3f} ({100 * (tests[-1] / tests[0] - 1):+.1f} %)"
        f" in {history[-1].step} steps and {history[-1].elapsed_s:.0f} s\n"
        f"Look at    {settings.out / CURVES_FILE}, {settings.out / 'answers.md'}, {settings.out / METRICS_FILE}\n"
        f"Sample     {paths['sampler']}\nContinue   {paths['state']}",
        soft_wrap=True,
        highlight=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_settings(arguments)
    try:
        require_reachable(settings.base_url)
        with tinker.ServiceClient(base_url=settings.base_url, api_key=settings.api_key) as service:
            return run(settings, service)
    except KeyboardInterrupt:
        print("\nStopped; this run saved nothing further.", file=sys.stderr)
        return 130
    except (tinker.TinkerError, DatasetError, TemplateError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
