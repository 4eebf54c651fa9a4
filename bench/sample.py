"""Sampling from the embedded SmolLM2-135M: this engine's sampler beside transformers.generate.

    python -m bench.sample [--rounds 3]

Temperature 1, no sequence ends early, 64 new tokens; a request is a prompt with its samples. ``s`` has the prompts in
it, for this engine and for generate alike; ``decode`` is this engine's rate over its median step, prompts left out.
Every round has fresh prompts. generate gets all sequences as one batch. Rows with one adapter are compared with
generate without any, which is harder for us, and with generate under peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from bench import baselines, ours
from bench.measure import ENGINE_ENVIRONMENT, Key, Measured, Variant, measure
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import SAMPLING, BaseModel, Text
from tuft.types import LoraSpec

MODULE = "bench.sample"

BF16 = "TuFT bf16"
GENERATE_BF16 = "generate bf16"
GENERATE_FLOAT32 = "generate float32"
PEFT_BF16 = "peft generate bf16"


def variants_of(base: BaseModel, spec: LoraSpec, text: Text) -> dict[str, Variant]:
    plain = [name for name, of_one in SAMPLING.items() if of_one.num_adapters == 0 and not of_one.shares_prompt]
    generate = partial(baselines.generate, base, SAMPLING, text=text)
    return {
        BF16: Variant(partial(ours.sampling, base, SAMPLING, "bf16", spec, text), SAMPLING, ENGINE_ENVIRONMENT),
        GENERATE_BF16: Variant(partial(generate, dtype=torch.bfloat16, spec=None), plain),
        GENERATE_FLOAT32: Variant(partial(generate, dtype=torch.float32, spec=None), ("8", "32")),
        PEFT_BF16: Variant(partial(generate, dtype=torch.bfloat16, spec=spec), ("8, one adapter", "32, one adapter")),
    }


def groups_of(cases: Sequence[str]) -> list[list[str]]:
    """What is compared takes turns: the cases of one batch size."""
    groups: dict[str, list[str]] = {}
    for case in cases:
        groups.setdefault(case.split(",")[0], []).append(case)
    return list(groups.values())


def baseline_key(case: str, variant: str) -> Key:
    """The row of ``variant`` that ``case`` is compared with: the same shape, without adapters unless under peft."""
    workload = SAMPLING[case]
    if variant == PEFT_BF16:
        return case, variant
    same = (name for name, other in SAMPLING.items() if other == replace(workload, num_adapters=0, shares_prompt=False))
    return next(same), variant


def sample_table(cases: list[str], measured: Measured) -> str:
    rows = []
    for case in cases:
        workload, key = SAMPLING[case], (case, BF16)
        seconds = measured.median(key)
        versus = []
        for variant in (GENERATE_BF16, GENERATE_FLOAT32, PEFT_BF16):
            other = baseline_key(case, variant)
            versus.append(f"{measured.ratio(other, key):.2f} x" if measured.has(other) else "")
        rows.append(
            (
                case,
                f"{workload.num_requests} x {workload.num_samples}",
                f"{seconds:.2f}",
                f"{workload.num_sequences * workload.num_new / seconds:.0f}",
                f"{workload.num_sequences / measured.median(key, 'decode_step'):.0f}",
                f"{1e3 * measured.median(key, 'decode_step'):.1f}",
                *versus,
            )
        )
    heads = ("sequences", "requests x samples", "s", "tokens/s", "decode tokens/s", "ms a step")
    return table((*heads, *(f"faster than {name}" for name in (GENERATE_BF16, GENERATE_FLOAT32, PEFT_BF16))), rows)


def baseline_table(cases: list[str], measured: Measured) -> str:
    rows = []
    for case in cases:
        for variant in (GENERATE_BF16, GENERATE_FLOAT32, PEFT_BF16):
            if measured.has((case, variant)):
                seconds, workload = measured.median((case, variant)), SAMPLING[case]
                rate = workload.num_sequences * workload.num_new / seconds
                rows.append((case, variant, f"{seconds:.2f}", f"{rate:.0f}"))
    return table(("sequences", "baseline", "s", "tokens/s"), rows)


def judge(measured: Measured) -> list[Judged]:
    found = []
    for count, must, aim in (("8", 2.0, 4.0), ("32", 2.2, 4.5)):
        over, under = (count, GENERATE_BF16), (f"{count}, one adapter", BF16)
        if measured.has(over, under):
            what = f"{count} sequences, one adapter: faster than generate bf16 without"
            found.append(Judged(what, measured.ratio(over, under), must, aim))
    over, under = ("32, 32 adapters", BF16), ("32", BF16)
    if measured.has(over, under):
        ratio = measured.ratio(over, under, "decode_step")
        found.append(Judged("32 sequences: a decode step with 32 adapters over none", ratio, 2.0, 1.3, is_limit=True))
    return found


def prefix_sentence(measured: Measured) -> str:
    apart, shared = ("8, prompts of 512", BF16), ("8, one prompt of 512", BF16)
    if not measured.has(apart, shared):
        return ""
    return f"8 requests with one prompt of 512 are {measured.ratio(apart, shared):.2f} x faster than with 8 prompts."


def main() -> None:
    parser = arguments(MODULE, __doc__, rounds=3)
    parser.add_argument("--case", nargs="+", choices=[*SAMPLING], default=[*SAMPLING], metavar="CASE")
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    base, spec = BaseModel.embedded(), LoraSpec(rank=options.rank, train_unembed=False)
    variants = variants_of(base, spec, Text.of_chats(base, options.chats))
    measured = measure(variants, groups_of(options.case), options.rounds)
    sections = [
        f"{base.name}, LoRA rank {spec.rank}. Prompts of 64 tokens unless said otherwise, 64 new tokens a sequence, "
        f"pure sampling. Medians of {options.rounds} rounds; ratios are of the same rounds, prompts included.",
        sample_table(options.case, measured),
        baseline_table(options.case, measured),
        prefix_sentence(measured),
        judged_table(judge(measured)),
    ]
    publish(MODULE, "Sampling", sections, options.markdown)


if __name__ == "__main__":
    main()
