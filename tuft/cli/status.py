"""`tuft status`: what waits on a running server, why, and for how long."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, out, print_json, print_table
from tuft.config import Config, load_config
from tuft.errors import ConfigError

_TIMEOUT_S = 10.0


def status(
    url: Annotated[str | None, typer.Option(help="the server  [default: the configured host and port]")] = None,
    key: Annotated[
        str | None, typer.Option(help="API key of the tenant  [default: TUFT_API_KEY, or the home's]")
    ] = None,
    limit: Annotated[int, typer.Option(help="so many waiting requests at most")] = 20,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a tenant's waiting requests with position, reason and ETA, and the server's load."""
    options = load_config(config, home=home)
    told = _asked(url or f"http://{options.server.host}:{options.server.port}", key or _key(options), limit)
    if as_json:
        print_json(told)
        return
    load = told["load"]
    out.print(
        f"{load['num_operations_waiting']} operations and {load['num_samples_waiting']} samples of "
        f"{load['num_tenants']} tenants wait; the engine has {load['num_passes_with_engine']} passes and "
        f"{load['num_samples_with_engine']} samples"
    )
    if not told["num_waiting"]:
        out.print("nothing of yours waits")
        return
    out.print(f"{told['num_waiting']} of yours:")
    print_table(
        ("kind", "of", "seq", "position", "eta", "why"),
        [
            (
                one["kind"],
                one["of"],
                str(one["seq"]),
                _number(one["position"]),
                _seconds(one["eta_s"]),
                one["reason"] or "",
            )
            for one in told["waiting"]
        ],
    )


def _key(options: Config) -> str:
    given = os.environ.get("TUFT_API_KEY")
    file = options.home / "api_key"
    if given:
        return given
    if file.exists():
        return file.read_text().strip()
    raise ConfigError(f"no API key: give --key, set TUFT_API_KEY, or name the server's home ({file} is not there)")


def _asked(url: str, key: str, limit: int) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/api/v1/queue?limit={limit}", headers={"X-API-Key": key})  # noqa: S310
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url: got {url!r}; must begin with http:// or https://")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 (http or https, see above)
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} refused: {json.loads(error.read()).get('detail', error.reason)}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"no server answers at {url}: {reason}; `tuft launch` starts one") from error


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
