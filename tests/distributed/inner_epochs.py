"""A worker: trains a policy of four weights for some inner epochs on its part of twelve samples, and notes what it received and sent."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from helpers import LinearPolicy, make_preset, make_trajectory  # noqa: E402

from tdpo_cli.algorithms.critic import Critic  # noqa: E402
from tdpo_cli.machine.memory import Plan  # noqa: E402
from tdpo_cli.machine.world import World  # noqa: E402
from tdpo_cli.randomness import Randomness, shuffle_plan, unshuffled  # noqa: E402
from tdpo_cli.train import sharing  # noqa: E402
from tdpo_cli.train.rollout import Draw  # noqa: E402
from tdpo_cli.train.state import make_optimizers  # noqa: E402
from tdpo_cli.train.update import Learner, Observer  # noqa: E402
from tdpo_cli.types import Credit  # noqa: E402

SAMPLES, STEPS = 12, 3


class Noting(World):
    """A world that notes the rows of latents it sends."""

    sent: list[int] = []

    def exchange(self, tensor, outgoing, incoming):
        self.sent.append(sum(map(len, outgoing.values())))
        return super().exchange(tensor, outgoing, incoming)


def train(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    """-> weights after all inner epochs, and what was held and sent"""
    preset = make_preset(**{
        "rollout__samples_per_epoch": SAMPLES, "rollout__steps": STEPS, "update__batch_size": 4, "update__inner_epochs": 2,
        "rollout__guidance_scale": 1.0, "update__clip_range": 0.1, "update__learning_rate": 1e-2, "update__critic_learning_rate": 1e-2, **settings,
    })  # fmt: skip
    policy, draws = LinearPolicy(STEPS), torch.Generator().manual_seed(5)
    whole, scores = make_trajectory(policy, SAMPLES), torch.randn(SAMPLES, generator=draws)
    advantages, returns = torch.randn(2, SAMPLES, STEPS, generator=draws).double()
    critic = Critic(5, 0.1) if preset.has_critic else None
    if critic:
        critic.initialise(torch.Generator().manual_seed(0))
    orders, order = [], unshuffled(SAMPLES, STEPS)
    for inner in range(preset.update.inner_epochs):
        orders.append(order := shuffle_plan(Randomness(3), 0, inner, order, True, True))
    home = sharing.homes(orders[0], preset.update.batch_size, world)
    samples, gathered = sharing.of_all(part(whole, home == world.rank), draw_of(whole), {"r": scores[home == world.rank]}, home, world)
    learner = Learner(policy, critic, make_optimizers(policy, critic, preset), preset, Randomness(3), Plan.of(2), world)
    for inner, order in enumerate(orders):
        learner.inner_epoch(samples, Credit(advantages, returns, returns[:, 0], None), order, inner, Observer())
    networks = [*policy.trainable.values(), *(critic.parameters() if critic else [])]
    same = lambda name: torch.equal(getattr(samples, name), getattr(whole, name))
    return {
        "weights": torch.cat([weight.detach().flatten() for weight in networks]).tolist(),
        "small columns are everyone's": all(map(same, ("log_probs", "image_embeds", "values", "text_rows", "sample_ids"))),
        "scores are everyone's": torch.equal(gathered["r"], scores) and samples.prompts == whole.prompts,
        "held": len(samples.latents), "sent": getattr(world, "sent", []),
    }  # fmt: skip


def part(whole, mine):
    """The samples that one process rolled out."""
    names = ("sample_ids", "text_rows", "latents", "log_probs", "image_embeds", "values", "images")
    pick = lambda texts: tuple(text for text, is_mine in zip(texts, mine, strict=True) if is_mine)
    return dataclasses.replace(
        whole, prompts=pick(whole.prompts), prompt_keys=pick(whole.prompt_keys), **{name: getattr(whole, name)[mine] for name in names}
    )


def draw_of(whole):
    return Draw(whole.epoch, whole.prompts, whole.prompt_keys, whole.texts, whole.text_rows)


if __name__ == "__main__":
    folder, rank, size, settings = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    (folder / f"{rank}.json").write_text(json.dumps(train(Noting(rank, size), settings)))
    torch.distributed.destroy_process_group()
