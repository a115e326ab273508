"""Kill a training run at random moments, resume it, and compare with the run that nobody killed.

    python tests/faults/kills.py FOLDER [--kills 50] [--seed 1] [--base sandbox-flow]

Every life is a fork of this process, which has imported everything already, so it takes a second instead of ten. Each
goes through the real command line (`tdpo train`, then `tdpo train --resume`) and dies by SIGKILL. A finished run is
compared and the next one started, until there were enough kills. Prints the counts as JSON; exit status 1 if any is bad.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import lives  # noqa: F401 - first: it finds the tests' own modules
import tiny
from lives import Life

from tdpo_cli.storage.run_dir import RunDir, damage, epochs_in

EPOCHS = 8
CHANGES = {"reward__train": "aesthetic", "run__epochs": EPOCHS, "run__save_every": 3, "run__keep_last": 2, "run__preview_images": 1}


def result(run: Path) -> dict[str, object]:
    """All that must not depend on interruptions: rows without timings, weights, previews, which states and checkpoints there are."""
    found: dict[str, object] = {
        "metrics.jsonl": tiny.rows(run),
        "preset.json": (run / "preset.json").read_bytes(),
    }
    for pattern in ("checkpoints/*/*.safetensors", "images/*.png"):
        found |= {str(file.relative_to(run)): file.read_bytes() for file in run.glob(pattern)}
    found["folders"] = sorted(str(folder.relative_to(run)) for part in ("state", "checkpoints") for folder in (run / part).iterdir())
    found["damaged"] = [damage(folder) for part in ("state", "checkpoints") for folder in epochs_in(run / part)]
    return found


def campaign(place: Path, kills: int, seed: int, base: str) -> dict[str, object]:
    place.mkdir(parents=True, exist_ok=True)
    preset = tiny.preset(place, **CHANGES, model__base=base)
    draw, begun = random.Random(seed), time.monotonic()
    straight = place / "straight"
    life = Life("train", "--preset", preset, "--out", straight)
    assert life.ended(600) and life.status == 0, f"the uninterrupted run ended with {life.status}:\n{life.text.decode()}"
    life.close()
    length = time.monotonic() - begun
    expected = result(straight)

    counts = dict.fromkeys(
        "runs kills resumes before_the_first_epoch half_written torn_or_early_rows epochs_lost epochs_doubled epochs_sampled_again "
        "failed_starts unequal_runs".split(), 0,
    )  # fmt: skip
    while counts["kills"] < kills:
        run = place / f"run-{counts['runs']:03d}"
        counts["runs"] += 1
        finished = -1  # the newest state that was on disk when the last life ended
        while True:
            resume = RunDir(run).holds_a_run
            arguments = ["--resume"] if resume else ["--preset", preset]
            life = Life("train", *arguments, "--out", run)
            counts["resumes"] += resume
            # most lives end in their first epochs, so that a run takes many of them
            wait = draw.uniform(0, 0.6 * length) if counts["kills"] < kills else 600
            if not life.ended(wait):
                life.kill()
                counts["kills"] += 1
            elif life.status != 0:
                counts["failed_starts"] += 1
                life.all_gone(5)
                print(life.text.decode(errors="replace")[-3000:], file=sys.stderr)
                return counts
            life.close()
            environments = json.loads((run / "env.json").read_text()) if (run / "env.json").exists() else []
            if environments and len(environments) == counts.get("starts_seen", 0) + 1:
                counts["epochs_sampled_again"] += environments[-1]["first_epoch"] != finished + 1
            counts["starts_seen"] = len(environments)
            states = [folder for folder in epochs_in(run / "state") if damage(folder) is None]
            newest = int(states[-1].name.removeprefix("epoch_")) if states else -1
            counts["epochs_lost"] += newest < finished
            finished = newest
            if life.status == 0:
                break
            counts["before_the_first_epoch"] += newest < 0
            counts["half_written"] += any(run.rglob(".*.tmp")) if run.exists() else 0
            text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
            counts["torn_or_early_rows"] += text.count("\n") != newest + 1 or not text.endswith("\n") and text != ""
        counts.pop("starts_seen")
        got = result(run)
        epochs = [row["epoch"] for row in got["metrics.jsonl"]]
        counts["epochs_lost"] += len(set(range(EPOCHS)) - set(epochs))
        counts["epochs_doubled"] += len(epochs) - len(set(epochs))
        if got != expected:
            counts["unequal_runs"] += 1
            different = [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]
            print(f"{run} differs from {straight} in: {', '.join(different)}", file=sys.stderr)
    return {**counts, "epochs_per_run": EPOCHS, "seed": seed, "seconds": round(time.monotonic() - begun, 1)}


BAD = ("epochs_lost", "epochs_doubled", "epochs_sampled_again", "failed_starts", "unequal_runs")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", default="sandbox", choices=("sandbox", "sandbox-flow"))
    given = parser.parse_args()
    outcome = campaign(given.folder, given.kills, given.seed, given.base)
    print(json.dumps(outcome))
    raise SystemExit(any(outcome[name] for name in BAD))
