"""Bytes of a trajectory that each process holds and sends, at the shapes of a 1024-pixel image, in real processes over gloo.

    python benchmarks/latents.py --processes 2 --samples 32

Latents [16,128,128] in fp32 (Stable Diffusion 3.5), 10 steps, image embeddings of width 1024. No network runs: the latents are made up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402

from tdpo_cli.machine.world import World  # noqa: E402
from tdpo_cli.randomness import Randomness, shuffle_plan, unshuffled  # noqa: E402
from tdpo_cli.train import sharing  # noqa: E402
from tdpo_cli.train.rollout import Draw  # noqa: E402
from tdpo_cli.types import Conditioning, ShufflePlan, Trajectory  # noqa: E402

LATENT, STEPS, WIDTH = (16, 128, 128), 10, 1024


class Counting(World):
    """A world that counts the bytes it sends to others."""

    sent = 0

    def gather(self, columns, home):
        self.sent += sum(column.nbytes for column in columns.values()) * (self.size - 1)
        return super().gather(columns, home)

    def exchange(self, tensor, outgoing, incoming):
        self.sent += sum(map(len, outgoing.values())) * tensor[0].nbytes
        return super().exchange(tensor, outgoing, incoming)


def sampled(ids: list[int]) -> Trajectory:
    """What a rollout leaves of these samples; the latents say whose they are."""
    count = len(ids)
    latents = torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, STEPS + 1, *LATENT).contiguous()
    return Trajectory(
        epoch=0, prompts=("a",) * count, prompt_keys=("a",) * count, sample_ids=torch.tensor(ids), texts=Conditioning({"embeds": torch.zeros(2, 1)}),
        text_rows=torch.zeros(count, dtype=torch.int64), steps=torch.arange(STEPS), latents=latents, log_probs=torch.zeros(count, STEPS),
        ref_log_probs=None, image_embeds=torch.zeros(count, STEPS, WIDTH), values=torch.zeros(count, STEPS), images=torch.zeros(count, 3, 1, 1),
    )  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def orders(samples: int, count: int) -> list[ShufflePlan]:
    found, order = [], unshuffled(samples, STEPS)
    for inner in range(count):
        found.append(order := shuffle_plan(Randomness(0), 0, inner, order, True, True))
    return found


def measure(world: Counting, samples: int, batch: int, inner_epochs: int) -> list[dict[str, Any]]:
    """-> one row per inner epoch, of this process"""
    before, found = peak(), []
    plans = orders(samples, inner_epochs)
    home = sharing.homes(plans[0], batch, world)
    own = sampled((home == world.rank).nonzero().flatten().tolist())
    draw = Draw(0, ("a",) * samples, ("a",) * samples, own.texts, torch.zeros(samples, dtype=torch.int64))
    everyone, _ = sharing.of_all(own, draw, {"reward": torch.zeros(len(own))}, home, world)
    small = world.sent
    for order in plans:
        world.sent = 0
        latents = sharing.latents_of(everyone, order, batch, world)
        check(latents, order, batch, world)
        columns = [everyone.log_probs, everyone.image_embeds, everyone.values]
        found.append({
            "latents": latents.own.nbytes + latents.visitors.nbytes, "small_columns": sum(column.nbytes for column in columns),
            "small_sent": small, "latents_sent": world.sent, "peak": peak() - before,
        })  # fmt: skip
    return found


def check(latents: sharing.Latents, order: ShufflePlan, batch: int, world: World) -> None:
    """The latents of every sample that this process trains on are here, and are that sample's."""
    mine = (sharing.trainers(order, batch, world) == world.rank).nonzero().flatten()
    states = latents.states(mine, torch.full_like(mine, STEPS), torch.device("cpu"))
    if not torch.equal(states[:, 0, 0, 0], mine.float()):
        raise SystemExit("latents of other samples arrived")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--inner-epochs", type=int, default=2)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # rank, folder
    options = parser.parse_args()
    if options.worker:
        rank, folder = int(options.worker[0]), Path(options.worker[1])
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=options.processes)
        rows = measure(Counting(rank, options.processes), options.samples, options.batch, options.inner_epochs)
        (folder / f"{rank}.json").write_text(json.dumps(rows))
        torch.distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        workers = [subprocess.Popen([sys.executable, *sys.argv, "--worker", str(rank), folder]) for rank in range(options.processes)]
        if any([worker.wait() for worker in workers]):
            raise SystemExit("a process failed")
        print(json.dumps([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.processes)], indent=2))


if __name__ == "__main__":
    main()
