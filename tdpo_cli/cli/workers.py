"""Start workers or be one: what every command that shares its work does first."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from tdpo_cli.cli import options
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import launch


@dataclass(frozen=True)
class Workers:
    """Who shares the work, by the flags."""

    plan: launch.Plan
    asked: bool  # --gpus or --processes was given

    @staticmethod
    def of(gpus: int | None, processes: int | None) -> Workers:
        """Raises RequestError for flags that exclude each other."""
        return Workers(launch.plan(gpus, processes), bool(gpus or processes))

    @property
    def several(self) -> bool:
        return self.plan.workers > 1

    @property
    def device(self) -> str | None:
        """The kind of device that the flags ask for; None leaves the choice."""
        return self.plan.device if self.asked else None

    def must_share(self, out: Path | None) -> None:
        """RequestError where each worker that another launcher started would choose a folder of its own."""
        if out is None and launch.is_worker():
            raise RequestError("workers that another launcher starts need --out, the same for all of them.")

    def start(self, samples: int, out: Path, any_launcher: bool = False) -> None:
        """Return in a process that does the work; else run the workers, all with the same `out`, and exit with their status.

        `any_launcher`: without --gpus and --processes torchrun and its kin decide how many workers there are. Raises RequestError, WorkError.
        """
        if launch.is_worker():
            launch.check_environment()
            if self.asked or not any_launcher:
                launch.check_world(self.plan)
            return
        options.prepare_libraries()  # the check of GPUs loads torch
        launch.check(self.plan, samples)
        if self.several:
            raise typer.Exit(launch.run(self.plan, [*sys.argv[1:], "--out", str(out)]))
