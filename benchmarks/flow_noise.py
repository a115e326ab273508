"""How much noise a flow-matching rollout leaves in the state, step by step, beside what the network is told.

    python benchmarks/flow_noise.py [--out docs/flow_noise.png]

prints the table of docs/flow.md and draws its figure. No model is needed: the velocity is taken to be exact, so that all noise comes
from the sampler. The schedule is Stable Diffusion 3.5's (shift 3) at 10 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tdpo_cli.models.samplers.flow import Flow

SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
STEPS = 10
LEVELS = {"flow-sde": 0.7, "cps": 0.8}  # as published
COLOURS = {"flow-sde": "#d55e00", "cps": "#0072b2"}  # Okabe and Ito's


def samplers() -> dict[str, Flow]:
    """With noise in every step, so that the last one is shown too."""
    return {name: Flow.of(SCHEDULER, [level] * STEPS, name) for name, level in LEVELS.items()}


def left(sampler: Flow) -> list[float]:
    """Standard deviation of the noise in the state after each step: what the step keeps and what it adds are independent."""
    return (sampler.coefficient**2 + sampler.std**2).sqrt().tolist()


def table() -> str:
    """Markdown: a column per step."""
    found = samplers()
    any_sampler = next(iter(found.values()))
    rows = [("sigma before the step", any_sampler.sigma.tolist()), ("sigma that the network is told next", any_sampler.sigma_next.tolist())]
    for name, sampler in found.items():
        rows += [(f"{name} {LEVELS[name]}: std of the step", sampler.std.tolist()), (f"{name} {LEVELS[name]}: noise in the state", left(sampler))]
    lines = ["| step | " + " | ".join(map(str, range(STEPS))) + " |", "|---" * (STEPS + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for title, values in rows]
    return "\n".join(lines)


def draw(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    found = samplers()
    told = next(iter(found.values())).sigma_next.tolist()
    axes.plot(range(STEPS), told, color="black", marker="o", linewidth=1, label="what the network is told next (sigma')")
    for name, sampler in found.items():
        style = {"marker": "s"} if name == "flow-sde" else {"marker": "x", "linestyle": "--"}
        axes.plot(range(STEPS), left(sampler), color=COLOURS[name], label=f"{name}, noise level {LEVELS[name]}", **style)
    axes.annotate(
        f"{left(found['flow-sde'])[8]:.2f} against {told[8]:.3f}", (8, left(found["flow-sde"])[8]), (7.7, 0.42), arrowprops={"arrowstyle": "-"}
    )
    axes.set(xlabel="after step", ylabel="noise in the state (standard deviation)", xticks=range(STEPS), ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "flow_noise.png")
    draw(parser.parse_args().out)
    print(table())
