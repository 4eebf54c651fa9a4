"""`tuft estimate`: tokens, time, cost and memory of a fine-tuning run on chats, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, out, print_json
from tuft.config import Config, load_config
from tuft.errors import InvalidInput
from tuft.types import LoraSpec

if TYPE_CHECKING:
    from tuft.cli.chats import Chats
    from tuft.engine.base import BaseModelSource

_CALIBRATE_S = 10.0


def estimate(
    dataset: Annotated[Path, typer.Argument(help='JSON Lines of chats: {"messages": [{"role": ..., "content": ...}]}')],
    base_model: Annotated[str | None, typer.Option(help="name or alias; default: the first that is configured")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank")] = 8,
    train_attn: Annotated[bool, typer.Option(help="adapt the attention layers")] = True,
    train_mlp: Annotated[bool, typer.Option(help="adapt the MLP layers")] = True,
    train_unembed: Annotated[bool, typer.Option(help="adapt the output head")] = False,
    epochs: Annotated[float, typer.Option(min=0.0, help="passes over the data")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="conversations a step")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest datum; what is longer is cut at its end")] = 1024,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="of training; default: as this home's server measured it last")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help=f"measure it here, now: about {_CALIBRATE_S:g} s and an engine's memory")
    ] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the tokens, steps, time, cost and memory that a fine-tuning run on chats will take."""
    from tuft.app import model_sources, prepare_home
    from tuft.cli.chats import num_steps, read_chats, render
    from tuft.models.chat_template import ChatTemplate
    from tuft.models.tokenizer import write_tokenizer_files

    options = load_config(config, home=home)
    prepare_home(options.home)
    source = _source(model_sources(options), base_model)
    tokenizer_dir = Path(source.tokenizer_dir)
    write_tokenizer_files(source.path, tokenizer_dir)
    chats = render(read_chats(dataset), ChatTemplate(tokenizer_dir), max_tokens)
    if not chats.inputs:
        raise InvalidInput("max_tokens", max_tokens, "no conversation has an answer that early")
    spec = LoraSpec(rank, None, train_attn, train_mlp, train_unembed)
    origin = "given"
    if calibrate:
        from tuft.cli.calibration import measure_pace

        tokens_per_s = measure_pace(options, source.name, spec, chats.inputs, batch_size, _CALIBRATE_S)
        origin = "measured here just now"
    elif tokens_per_s is None:
        tokens_per_s, origin = _measured_pace(options, source.name)
    facts = {
        **_counted(chats, epochs, num_steps(len(chats.inputs), epochs, batch_size)),
        **_priced(options, source.name, round(chats.num_tokens * epochs)),
        **_sized(tokenizer_dir, spec),
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_origin": origin,
        "seconds": None if tokens_per_s is None else chats.num_tokens * epochs / tokens_per_s,
    }
    if as_json:
        print_json({"base_model": source.name, "rank": rank, "epochs": epochs, "batch_size": batch_size, **facts})
    else:
        _print(source.name, facts)


def _source(sources: list[BaseModelSource], wanted: str | None) -> BaseModelSource:
    if wanted is None:
        return sources[0]
    for source in sources:
        if wanted == source.name or wanted in source.aliases:
            return source
    raise InvalidInput("base_model", wanted, f"must be one of {', '.join(source.name for source in sources)}")


def _measured_pace(options: Config, base_model: str) -> tuple[float | None, str]:
    from tuft.app import open_store
    from tuft.store.paces import PaceTable

    database = open_store(options)
    try:
        pace = PaceTable(database).get(base_model)
    finally:
        database.close()
    if pace is None:
        return None, "unknown: no server of this home has trained the model yet; give --tokens-per-s or --calibrate"
    measured = f"measured by the server of {options.home}, {pace.measured_at:%Y-%m-%d %H:%M} UTC"
    return pace.tokens_per_s, f"{measured}, over {pace.num_tokens:,} tokens"


def _counted(chats: Chats, epochs: float, steps: int) -> dict[str, int]:
    return {
        "num_conversations": len(chats.inputs),
        "num_cut": chats.num_cut,
        "num_dropped": chats.num_dropped,
        "longest_tokens": max(len(tokens) for tokens in chats.inputs),
        "num_tokens_per_epoch": chats.num_tokens,
        "num_tokens": round(chats.num_tokens * epochs),
        "num_steps": steps,
    }


def _priced(options: Config, base_model: str, num_tokens: int) -> dict[str, float | str]:
    from tuft.service.prices import Prices

    prices = Prices(options.prices)
    return {"cost": prices.cost("training", base_model, num_tokens), "currency": prices.currency}


def _sized(tokenizer_dir: Path, spec: LoraSpec) -> dict[str, int]:
    from tuft.footprint import adapter_parameters, checkpoint_bytes, resident_bytes
    from tuft.models.architecture import DecoderConfig
    from tuft.models.source import read_json

    shapes = DecoderConfig.from_hf(read_json(tokenizer_dir / "config.json")).linear_shapes()
    return {
        "adapter_parameters": adapter_parameters(shapes, spec),
        "adapter_bytes": resident_bytes(shapes, spec, "adamw"),
        "checkpoint_bytes": checkpoint_bytes(shapes, spec, "adamw", with_optimizer=True),
    }


def _print(base_model: str, facts: dict[str, int | float | str | None]) -> None:
    left_out = ", ".join(
        f"{facts[name]} {words}"
        for name, words in (("num_cut", "cut at their end"), ("num_dropped", "left out: no answer that early"))
        if facts[name]
    )
    seconds = facts["seconds"]
    time = "unknown" if seconds is None else _duration(float(seconds))
    rate = "" if seconds is None else f"{facts['tokens_per_s']:,.1f} tokens/s, "
    out.print(f"[bold]{base_model}[/]")
    out.print(f"  conversations  {facts['num_conversations']:,}" + (f" ({left_out})" if left_out else ""))
    out.print(f"  tokens         {facts['num_tokens']:,}  [dim]{facts['num_tokens_per_epoch']:,} an epoch, "
              f"longest datum {facts['longest_tokens']:,}[/]")  # fmt: skip
    out.print(f"  steps          {facts['num_steps']:,}")
    out.print(f"  time           {time}  [dim]{rate}{facts['tokens_per_s_origin']}[/]")
    out.print(f"  cost           {float(facts['cost'] or 0):,.6f} {facts['currency']}")
    out.print(f"  memory         {int(facts['adapter_bytes'] or 0) / 1e6:,.1f} MB beside the base model  "
              f"[dim]weights, gradients and moments of {facts['adapter_parameters']:,} parameters[/]")  # fmt: skip
    out.print(f"  checkpoint     {int(facts['checkpoint_bytes'] or 0) / 1e6:,.1f} MB at most")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
