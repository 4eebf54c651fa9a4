"""One training step (forward, backward, AdamW) of the embedded SmolLM2-135M: this engine beside transformers + peft.

    python -m bench.train_step [--workload one small16 ...] [--rounds 3]

Workloads: one (1 tenant, 4 x 256 tokens), eight (8 such tenants), small16 (16 tenants, 1 x 64), ragged (4 tenants of
uneven sequences), grpo (a group of answers to one prompt), optim16 (16 runs' AdamW alone). All variants have the same
weights, adapters and text; half of every sequence is trained on. peft's tenants come one after another, each a padded
batch with its own AdamW. ``floor`` replays the base model's matrix products alone, in bf16 and at the same shapes: what
no engine on this machine can beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from bench import baselines, ours
from bench.measure import ENGINE_ENVIRONMENT, Key, Measured, Variant, measure
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import TRAINING, BaseModel, Optimizer, Text, Training
from tuft.types import LoraSpec

MODULE = "bench.train_step"
WORKLOADS = [*TRAINING, "optim16"]

FLOOR = "floor (bf16 products alone)"
BF16 = "TuFT bf16"
AS_ONE = "TuFT bf16, as one tenant"
UNSHARED = "TuFT bf16, prompt not shared"
FLOAT32 = "TuFT float32"
AUTOCAST = "transformers + peft, bf16 autocast"
PEFT = "transformers + peft, float32"
OPTIM = "TuFT, one call for all runs"
ADAMW = "torch.optim.AdamW a run"
FUSED_ADAMW = "torch.optim.AdamW(fused=True) a run"


def step_variants(base: BaseModel, workloads: Mapping[str, Training]) -> dict[str, Variant]:
    as_one = {name: workload.as_one_tenant() for name, workload in workloads.items() if name == "small16"}
    padded = workloads.keys() - {"grpo"}  # peft would need about 15 GB for its 4,608 tokens in one batch
    bf16 = partial(ours.training, base, workloads, "bf16")
    return {
        FLOOR: Variant(partial(baselines.floor, base, workloads), workloads),
        BF16: Variant(bf16, workloads, ENGINE_ENVIRONMENT),
        AS_ONE: Variant(partial(ours.training, base, as_one, "bf16"), as_one, ENGINE_ENVIRONMENT),
        UNSHARED: Variant(partial(bf16, share_prefixes=False), {"grpo"} & workloads.keys(), ENGINE_ENVIRONMENT),
        FLOAT32: Variant(partial(ours.training, base, workloads, "float32"), workloads, ENGINE_ENVIRONMENT),
        AUTOCAST: Variant(partial(baselines.peft_training, base, workloads, autocast=True), padded),
        PEFT: Variant(partial(baselines.peft_training, base, workloads, autocast=False), padded),
    }


def optimizer_variants(base: BaseModel, workloads: Mapping[str, Optimizer]) -> dict[str, Variant]:
    torch_optimizers = partial(baselines.torch_optimizers, base, workloads)
    return {
        OPTIM: Variant(partial(ours.optimizer, base, workloads), workloads, ENGINE_ENVIRONMENT),
        ADAMW: Variant(partial(torch_optimizers, fused=None), workloads),
        FUSED_ADAMW: Variant(partial(torch_optimizers, fused=True), workloads),
    }


def judge(measured: Measured) -> list[Judged]:
    found: list[Judged] = []

    def ratio(what: str, over: Key, under: Key, must: float, aim: float, is_limit: bool = False) -> None:
        if measured.has(over, under):
            found.append(Judged(what, measured.ratio(over, under), must, aim, is_limit=is_limit))

    one, small, ragged, grpo, optim = (partial(_key, case) for case in ("one", "small16", "ragged", "grpo", "optim16"))
    ratio("1 tenant 4 x 256, bf16: time over the floor", one(BF16), one(FLOOR), 1.8, 1.3, is_limit=True)
    ratio("1 tenant 4 x 256, bf16: faster than peft float32", one(PEFT), one(BF16), 2.0, 2.8)
    ratio("1 tenant 4 x 256, bf16: faster than peft autocast", one(AUTOCAST), one(BF16), 1.2, 1.6)
    ratio("1 tenant 4 x 256, float32: faster than peft float32", one(PEFT), one(FLOAT32), 1.05, 1.4)
    ratio("16 tenants 1 x 64, bf16: faster than peft float32", small(PEFT), small(BF16), 3.0, 5.0)
    ratio("16 tenants 1 x 64, bf16: faster than peft autocast", small(AUTOCAST), small(BF16), 2.5, 4.0)
    ratio("16 tenants 1 x 64: time over one tenant's", small(BF16), small(AS_ONE), 1.15, 1.03, is_limit=True)
    ratio("4 ragged tenants, bf16: faster than padded peft float32", ragged(PEFT), ragged(BF16), 2.8, 4.5)
    ratio("4 ragged tenants, bf16: faster than padded peft autocast", ragged(AUTOCAST), ragged(BF16), 1.8, 3.0)
    ratio("8 answers of 64 to a prompt of 512: faster than unshared", grpo(UNSHARED), grpo(BF16), 2.5, 4.0)
    ratio("optim_step of 16 runs: faster than an AdamW a run", optim(ADAMW), optim(OPTIM), 8.0, 15.0)
    return found


def _key(case: str, variant: str) -> Key:
    return case, variant


def step_table(case: str, workload: Training, measured: Measured, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        key = case, name
        if not measured.has(key):
            continue
        seconds = measured.median(key)
        optimizer = "" if name == FLOOR else f"{measured.median(key, 'optimizer'):.3f}"
        versus = f"{measured.ratio((case, PEFT), key):.2f} x" if measured.has((case, PEFT)) else ""
        rows.append(
            (
                name,
                f"{seconds:.3f}",
                f"{min(measured.rounds[key]['seconds']):.3f}",
                optimizer,
                f"{workload.num_tokens / seconds:.0f}",
                f"{measured.ratio(key, (case, FLOOR)):.2f}",
                versus,
                _loss(measured, case, name),
            )
        )
    heads = ("variant", "s (median)", "s (min)", "of it optimizer", "tokens/s", "over the floor", "peft float32 / it")
    return f"{case}: {workload.title}; {workload.num_tokens} tokens:\n\n" + table((*heads, "loss"), rows)


def _loss(measured: Measured, case: str, name: str) -> str:
    """The first tenant's, before any step; with its distance from peft float32 where that was computed."""
    (loss,) = measured.first[case, name].get("loss") or (math.nan,)
    if math.isnan(loss) or name == AS_ONE:
        return ""
    (expected,) = measured.first.get((case, PEFT), {}).get("loss") or (math.nan,)
    return f"{loss:.3f}" + ("" if math.isnan(expected) else f" ({(loss - expected) / abs(expected):+.1e})")


def optimizer_table(case: str, workload: Optimizer, measured: Measured, names: Sequence[str]) -> str:
    rows = [
        (name, f"{1e3 * measured.median((case, name)):.1f}", f"{measured.ratio((case, name), (case, OPTIM)):.2f}")
        for name in names
    ]
    title = f"{case}: AdamW of {workload.num_runs} runs, rank {workload.spec.rank}:\n\n"
    return title + table(("variant", "ms (median)", "over TuFT"), rows)


def main() -> None:
    parser = arguments(MODULE, __doc__, rounds=3)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--train-unembed", action="store_true", help="LoRA on the head too")
    options = parser.parse_args()
    base = BaseModel.embedded()
    spec = LoraSpec(rank=options.rank, train_unembed=options.train_unembed)
    text = Text.of_chats(base, options.chats)
    steps = {name: make(text, spec) for name, make in TRAINING.items() if name in options.workload}
    optimizers = {name: Optimizer(spec) for name in options.workload if name not in TRAINING}
    variants = {**step_variants(base, steps), **optimizer_variants(base, optimizers)}
    measured = measure(variants, [[name] for name in (*steps, *optimizers)], options.rounds)
    sections = [
        f"{base.name}, LoRA rank {spec.rank} on all linear layers{' and the head' if spec.train_unembed else ''}. "
        f"Medians of {options.rounds} rounds in which the variants took turns; ratios are of neighbours. The loss is "
        "the first tenant's before any step, with its relative distance from peft float32.",
        *(step_table(name, workload, measured, list(variants)) for name, workload in steps.items()),
        *(optimizer_table(name, workload, measured, list(variants)[-3:]) for name, workload in optimizers.items()),
        judged_table(judge(measured)),
    ]
    publish(MODULE, "Training step", sections, options.markdown)


if __name__ == "__main__":
    main()
