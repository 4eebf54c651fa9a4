"""`tuft launch`: the server in a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from tuft import __version__
from tuft.cli.options import ConfigOption, HomeOption, escaped, out
from tuft.config import Config, load_config
from tuft.types import BaseModelInfo


def launch(
    config: ConfigOption = None,
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="address to listen on  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port; 0 takes a free one  [default: 10610]")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log every operation that fails")] = False,
) -> None:
    """Start the server. Without options: the embedded model, state under ~/.tuft, http://localhost:10610."""
    options = load_config(config, home=home, **{"server.host": host, "server.port": port})
    from tuft.cli.logs import log_to_stderr

    log_to_stderr(logging.INFO if verbose else logging.WARNING)
    from tuft.app import serve

    serve(options, _Terminal(options))
    out.print("stopped")


class _Terminal:
    """Tells the person who launched the server how it is doing, and how to connect."""

    def __init__(self, options: Config) -> None:
        self._options = options
        self._started_s = time.monotonic()

    def listening(self, url: str, key: str | None, key_is_new: bool) -> None:
        out.print(f"TuFT {__version__}")
        out.print(f"  base URL  [bold]{url}[/]")
        if self._options.api_key is not None:
            key = None
            out.print("  API key   the one in TUFT_API_KEY")
        elif key is None:
            out.print("  API key   [dim]`tuft key create --tenant NAME` prints one[/]")
        else:
            origin = f"{'made now, kept' if key_is_new else 'kept'} in {self._options.home / 'api_key'}"
            out.print(f"  API key   [bold]{escaped(key)}[/]  [dim]({escaped(origin)})[/]")
        out.print("  try it in Python:\n")
        print(
            "import tinker\n"
            f'client = tinker.ServiceClient(base_url="{url}", api_key="{key or "tml-..."}")\n'
            "print(client.get_server_capabilities().supported_models)\n"
        )
        out.print("[dim]loading the base model ...[/]")

    def ready(self, models: Sequence[BaseModelInfo]) -> None:
        for model in models:
            facts = f"{model.num_parameters / 1e6:,.0f} M parameters, {model.precision}"
            out.print(f"[green]●[/] {model.name}  [dim]{facts}, context {model.max_context_tokens} tokens[/]")
            for need in model.memory_plan:
                out.print(f"  [dim]{need.num_bytes / 1e6:7,.0f} MB  {need.purpose}[/]")
        out.print(f"[bold green]ready[/] after {time.monotonic() - self._started_s:.1f} s; Ctrl-C stops the server")

    def stopping(self) -> None:
        out.print("stopping: queued work ends first ...")
