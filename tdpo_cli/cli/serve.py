"""`tdpo serve`: rewards over HTTP, for runs whose environment cannot hold them."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from tdpo_cli.cli import options
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError


def serve(
    rewards: Annotated[list[str], typer.Argument(metavar="REWARD...", help="Built-in rewards, or your own.")],
    host: Annotated[str, typer.Option(help="Other than this machine's own address: anyone who reaches it can use the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8765,
    variant: Annotated[str, typer.Option(metavar="tdpo|package", help="As the official TDPO, or as each reward's own package.")] = "tdpo",
    checkpoint: options.CheckpointOption = None,
    zoo: options.ZooOption = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")] = None,
    max_mib: Annotated[int, typer.Option(min=1, max=4096, help="Pixels in one request, in MiB.")] = 64,
    json_: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Serve rewards over HTTP until SIGTERM or Ctrl-C."""
    from tdpo_cli import rewards as known

    if zoo not in (None, "sandbox"):
        raise RequestError(f"--zoo {zoo}: expected sandbox.")
    names, paths = list(dict.fromkeys(rewards)), known.checkpoints(zoo, options.checkpoints(checkpoint))
    for name in names:
        known.check_name(name)
    options.prepare_libraries()
    from tdpo_cli.machine import world
    from tdpo_cli.rewards import serve as serving

    console = Console(quiet or json_)
    offered = serving.offers(names, device, paths, variant)
    server = serving.Server((host, port), offered, max_mib << 20, world.device(device))
    if host not in ("127.0.0.1", "::1", "localhost"):
        console.warn("there is no password: anyone who reaches this address can use the server.")
    for name, url in server.urls.items():
        console.say(f"{name}: {url}")
    if json_:
        print(json.dumps({"urls": server.urls, "versions": {one.reward.name: one.version for one in offered}}), flush=True)
    server.run()
    console.say("stopped.")
