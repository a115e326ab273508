"""Time every phase of an epoch against its bare network calls: rollout, critic's view, scoring, update.

    python benchmarks/phases.py                                   # both sandboxes
    python benchmarks/phases.py --family sd3 --family flux --wide 12  # tiny pipelines whose networks are so many times as wide

The calls are those that the epoch itself makes, recorded once and made again on the same arguments: no noise, log-prob, preprocessing,
loss or optimizer. One product epoch and one round of bare calls make a pair; ratios are product / bare by CPU time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pipelines  # noqa: E402
import torch  # noqa: E402
from calls import Calls, Meter  # noqa: E402
from pairs import facts  # noqa: E402
from timing import Phases, interleave, ratios, seconds, spread  # noqa: E402

from tdpo_cli.config import preset as presets  # noqa: E402
from tdpo_cli.config.settings import Preset  # noqa: E402
from tdpo_cli.console import Console  # noqa: E402
from tdpo_cli.machine.memory import Plan  # noqa: E402
from tdpo_cli.machine.world import World  # noqa: E402
from tdpo_cli.train import epoch as product  # noqa: E402
from tdpo_cli.train.rollout import Actor  # noqa: E402
from tdpo_cli.train.state import Job, build  # noqa: E402

VIEW = "critic's view"
FAMILIES = ("sdxl", "sd3", "flux", "flux2-klein", "z-image", "qwen-image")


# --- the product's epoch, by phase ----------------------------------------------------------------------------------------
class _Clocked(Console):
    """Its `timed` blocks are the meter's phases."""

    def __init__(self, meter: Meter):
        super().__init__(quiet=True)
        self.meter = meter

    @contextmanager
    def timed(self, kept: dict[str, float], name: str):
        with super().timed(kept, name), self.meter(name):
            yield


class Epochs:
    """A job whose first epoch can be run again and again from the same weights."""

    def __init__(self, job: Job):
        self.job, self.start = job, copy.deepcopy(job.state_dict())
        self.row: dict[str, Any] = {}

    def synchronize(self) -> None:
        if self.job.world.device.type == "cuda":
            torch.cuda.synchronize(self.job.world.device)

    def run(self, meter: Meter | None = None) -> Phases:
        """One epoch of the product. The critic's view, a part of the rollout, is a phase of its own."""
        meter = meter or Meter(self.synchronize)
        self.job.load_state_dict(copy.deepcopy(self.start))

        class Watched(Actor):
            def _look(self, film: Any) -> Any:
                with meter(VIEW):
                    return super()._look(film)

        with mock.patch.object(product, "Actor", Watched):
            self.row = product.run_epoch(self.job, 0, _Clocked(meter))
        return meter.phases

    def calls(self) -> Calls:
        """The network calls of the epoch."""
        found, meter = Calls(), Meter(self.synchronize)
        with found.recording(meter):
            self.run(meter)
        return found


# --- what is measured -----------------------------------------------------------------------------------------------------
def preset_of(base: str, flow: bool, samples: int, steps: int, batch: int, more: Sequence[tuple[str, Any]] = ()) -> Preset:
    """TDPO-R with one learned reward of the sandbox on a base model."""
    name = "quickstart-flow" if flow else "quickstart"
    settings = {
        "model.base": base, "rollout.samples_per_epoch": samples, "rollout.steps": steps, "update.batch_size": batch, "reward.watch": [],
        "run.preview_images": 0, "reward.min_count": 1,
    }  # fmt: skip
    return presets.load(name, [*settings.items(), *more])


def measure(preset: Preset, rounds: int, device: str = "cpu", plan: Plan | None = None) -> dict[str, Any]:
    """Per phase the ratio to its bare calls and the seconds; and how long one call of the denoiser takes."""
    preset_rows = preset.rollout.samples_per_epoch
    epochs = Epochs(build(preset, World(device=device), plan or Plan.of(preset_rows)))
    calls = epochs.calls()
    clock = 0 if device == "cuda" else 1
    timed = interleave({"product": epochs.run, "bare": lambda: calls.timed(epochs.synchronize)}, rounds)
    names = [*timed["bare"][0], "epoch"]
    report: dict[str, Any] = {
        "ratios": {name: spread(ratios(timed["product"], timed["bare"], name, clock)) for name in names},
        "seconds": {name: {who: spread(seconds(rows, name, clock))["median"] for who, rows in timed.items()} for name in names},
        "calls": {name: len(keys) for name, keys in calls.phases.items()},
        "ratio_drift": epochs.row["ratio_drift"],
    }
    weights = sum(parameter.numel() for parameter in epochs.job.policy.family.network.parameters())
    return report | {"denoiser": {"seconds_a_call": call_seconds(calls, epochs), "weights": weights}}


def call_seconds(calls: Calls, epochs: Epochs, repeats: int = 5) -> float:
    """One call of the denoiser in the rollout, the median."""
    call, found = calls.main_call("rollout"), []
    for _ in range(repeats):
        epochs.synchronize()
        start = time.perf_counter() if epochs.job.world.device.type == "cuda" else time.process_time()
        call()
        epochs.synchronize()
        found.append((time.perf_counter() if epochs.job.world.device.type == "cuda" else time.process_time()) - start)
    return statistics.median(found)


def show(name: str, report: dict[str, Any]) -> None:
    """A Markdown row: phases with least and most, then the denoiser's call."""
    cells = [f"{one['median']:.2f} ({one['least']:.2f} to {one['most']:.2f})" for one in report["ratios"].values()]
    denoiser = report["denoiser"]
    print(f"| {name} | {1e3 * denoiser['seconds_a_call']:.0f} ms, {denoiser['weights'] / 1e6:.2f} M | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES, default=[], help="a tiny pipeline, made for the measurement")
    parser.add_argument("--pipeline", action="append", default=[], choices=["sandbox", "sandbox-flow"], help="an embedded model [default: both]")
    parser.add_argument("--wide", type=int, default=1, help="times the width of the tiny pipelines' networks; above 1 also a larger CLIP")
    parser.add_argument("--pixels", type=int, default=64, help="of the tiny pipelines' images")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples per optimizer step")
    parser.add_argument("--rounds", type=int, default=5, help="paired runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    import diffusers

    from tdpo_cli import models

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bases = {name: name for name in options.pipeline or ([] if options.family else ["sandbox", "sandbox-flow"])}
        bases |= {name: str(pipelines.widened(name, Path(folder) / name, options.wide, options.pixels)) for name in options.family}
        reward = pipelines.reward(Path(folder) / "reward", "tiny" if options.wide == 1 else "middle") if options.family else None
        for name, base in bases.items():
            flow = models.family_of(models.resolve(base)).diffusion == "flow"
            own = [] if base in models.EMBEDDED else [("model.resolution", options.pixels), ("reward.checkpoints.aesthetic", str(reward))]
            report[name] = measure(preset_of(base, flow, options.samples, options.steps, options.batch, own), options.rounds)
            if not options.json:
                show(name, report[name])
    if options.json:
        work = {key: vars(options)[key] for key in ("wide", "pixels", "samples", "steps", "batch", "rounds")}
        print(json.dumps({**facts(), **work, "bases": report}))


if __name__ == "__main__":
    main()
