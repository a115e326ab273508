"""The hub's model card, written beside every checkpoint: what it is, how to load it, what its rewards did while it trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpo_cli import __version__
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.errors import WorkError
from tdpo_cli.models import T5
from tdpo_cli.models.lora_file import FILE as LORA_FILE
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import cross_eval_tables as tables
from tdpo_cli.sandbox import EMBEDDED, ZOO, is_embedded
from tdpo_cli.storage import run_dir

PROMPTS_SHOWN, PROMPT_LENGTH = 4, 120
BEGIN, END = "<!-- tdpo cross-eval: begin -->", "<!-- tdpo cross-eval: end -->"


def model_card(preset: Preset, rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], component: str) -> str:
    """Markdown with the hub's front matter.

    `rows`: the run's metrics up to this checkpoint's epoch, which is the last of them; `component`: what the pipeline calls its
    denoising network.
    """
    last = rows[-1]
    name, finding = preset.algorithm.name.upper(), verdict.read(rows, preset)
    sentence = "" if finding.kind == "too early" else f"Verdict, by the watched learned rewards: {finding.sentence}.\n\n"
    what = "the LoRA" if preset.model.lora_rank else "the whole network"
    return f"""{_front_matter(preset)}
# {name} on {_trained(preset)}, epoch {last["epoch"]}

`{_short(preset.model.base)}`, trained with tdpo {__version__} to raise the reward `{_trained(preset)}`{_held(preset)}:
{last["reward_queries"]:,} reward queries, {last["updates"]:,} optimizer steps.
This folder holds {_average(preset)}{what} after epoch {last["epoch"]} (the first is 0).

```python
{_loading(preset, prompts[0], component)}
```

## Rewards

Means over the epoch's own training samples. The rise is the mean of the last fifth of the epochs minus that of the first fifth, in standard
deviations of epoch 0. A reward model's score that rises does not prove better images: compare the rewards that were watched and never trained.

{_table(("reward", "", "epoch 0", f"epoch {last['epoch']}", "rise"), _reward_rows(preset, rows))}

{sentence}## Training

{_table(("setting", ""), _settings(preset, prompts))}

Sampled in training with {_noise(preset)}, guidance scale {preset.rollout.guidance_scale:g}.
"""


def _trained(preset: Preset) -> str:
    """What trains, without the folders of custom rewards."""
    return _short(preset.reward.train) if len(preset.weights) == 1 else preset.trained_words


def _held(preset: Preset) -> str:
    return f", while holding {preset.constraints_words} of epoch 0" if preset.reward.at_least else ""


def _average(preset: Preset) -> str:
    decay, every = preset.update.ema_decay, preset.update.ema_every
    return f"the moving average (decay {decay:g}, every {every} optimizer steps), not the trained weights themselves, of " if decay > 0 else ""


def _noise(preset: Preset) -> str:
    rollout = preset.rollout
    if rollout.dynamics in (None, "ddim"):
        return f"DDIM, {rollout.steps} steps, eta {1.0 if rollout.eta is None else rollout.eta:g}"
    return f"{rollout.dynamics}, {rollout.steps} steps, noise level {rollout.noise_level:g} in {preset.stochastic_steps} of them"


def add_cross_eval(folder: Path, result: Mapping[str, Any], name: str | None = None) -> str | None:
    """Put a cross-evaluation's table into the card of a checkpoint folder, or in place of the one before, and repair the manifest.

    `result` is cross_eval.json's content, `name` the model's in it (default: RUN/epoch_NNNN). -> None, or why the card
    stays as it is; nothing is raised, for a card is worth no evaluation.
    """
    model = _entry(folder, result, name)
    if model is None:
        return f"{folder}: this checkpoint is not among the models of the cross-evaluation."
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        # the marker as a line of its own: a prompt in the card may hold the same words
        before, _, rest = card.partition(f"\n{BEGIN}\n")
        after = rest.partition(END)[2].lstrip("\n") if rest else ""
        section = f"{BEGIN}\n{_cross_eval(model, result)}\n{END}\n"
        run_dir.rewrite(folder, "README.md", f"{before.rstrip()}\n\n{section}" + (f"\n{after}" if after else ""))
    except (OSError, ValueError, KeyError, TypeError, WorkError) as error:
        return f"{folder}: its model card stays without the cross-evaluation: {error}"
    return None


# --- the parts of a card ----------------------------------------------------------------------------------------------------
def _front_matter(preset: Preset) -> str:
    """YAML, every string quoted as in JSON. No licence: whose it is cannot be known here."""
    lora = preset.model.lora_rank > 0
    tags = ["text-to-image", "diffusers", *(["lora"] if lora else []), "reinforcement-learning", "tdpo", preset.algorithm.name]
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    if _on_the_hub(preset.model.base):
        lines += [f"base_model: {json.dumps(preset.model.base)}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---", ""])


def _loading(preset: Preset, prompt: str, component: str) -> str:
    """Python that makes an image, run inside the checkpoint's folder."""
    model, rollout, shown = preset.model, preset.rollout, preset.shown
    embedded = is_embedded(model.base)
    base = f'ZOO / "{EMBEDDED[model.base]}"' if embedded else json.dumps(model.base)
    base += f", revision={json.dumps(model.revision)}" if model.revision and not embedded else ""
    base += "".join(f", {part}=None" for part in _parts_left_out(model))
    words = {"negative_prompt": json.dumps(rollout.negative_prompt, ensure_ascii=False)} if rollout.negative_prompt else {}
    options = words | {"num_inference_steps": shown.steps, "guidance_scale": f"{shown.guidance_scale:g}"}
    arguments = ", ".join([json.dumps(prompt, ensure_ascii=False), *(f"{name}={value}" for name, value in options.items())])
    extra = ["from tdpo_cli.sandbox import ZOO"] if embedded else []
    if model.lora_rank:
        lines = [
            "from diffusers import DiffusionPipeline", *extra, "",
            f"pipe = DiffusionPipeline.from_pretrained({base})",
            f'pipe.load_lora_weights(".", weight_name="{LORA_FILE}")  # this folder, or its id on the hub',
        ]  # fmt: skip
    else:
        lines = [
            "from diffusers import AutoModel, DiffusionPipeline", *extra, "",
            f'network = AutoModel.from_pretrained(".", subfolder="{component}")  # this folder, or its id on the hub',
            f"pipe = DiffusionPipeline.from_pretrained({base}, {component}=network)",
        ]  # fmt: skip
    return "\n".join([*lines, f"image = pipe({arguments}).images[0]"])


def _parts_left_out(model: Model) -> list[str]:
    """Text encoders that this model does without. diffusers asks for them by name even where model_index.json has null."""
    if model.drop_t5:
        return list(T5)
    file = (ZOO / EMBEDDED[model.base] if is_embedded(model.base) else Path(model.base).expanduser()) / "model_index.json"
    listed = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [part for part in T5 if part in listed and listed[part][-1] is None]


def _reward_rows(preset: Preset, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    number = lambda row, name: "-" if (value := row.get(f"rewards/{name}/mean")) is None else f"{value:.4f}"
    table = []
    for name in preset.rewards:
        rise = verdict.rise(rows, name)
        role = (
            "trained"
            if name in preset.weights
            else "constraint"
            if name in preset.reward.at_least
            else "watched, the truth"
            if name in verdict.TRUE_REWARDS
            else "watched"
        )
        table.append((f"`{_short(name)}`", role, number(rows[0], name), number(rows[-1], name), "-" if rise is None else f"{rise:+.2f} sd"))
    return table


def _settings(preset: Preset, prompts: Sequence[str]) -> list[tuple[str, str]]:
    algorithm, update, rollout = preset.algorithm, preset.update, preset.rollout
    some = ", ".join(f"`{_shortened(prompt)}`" for prompt in prompts[:PROMPTS_SHOWN])
    rates = f"{update.learning_rate:g}" + (f", critic {update.critic_learning_rate:g}" if preset.has_critic else "")
    resets = f", {algorithm.reset_target} neurons reset every {algorithm.reset_every} epochs" if algorithm.facts.resets else ""
    rows = [
        ("algorithm", f"{algorithm.name} ({algorithm.facts.paper}){resets}"),
        ("prompts", f"{len(prompts)} of `{_short(rollout.prompts)}`, as {some}"),
        ("trained weights", f"LoRA of rank {preset.model.lora_rank}" if preset.model.lora_rank else "the whole network"),
        *([("started from", f"`{_short(preset.model.start_from)}`, which epoch 0 is")] if preset.model.start_from else []),
        ("samples per epoch", str(rollout.samples_per_epoch)),
        ("samples per optimizer step", str(update.batch_size)),
        ("learning rate", rates),
        ("clip range", f"{update.clip_range:g}"),
        ("seed", str(preset.run.seed)),
    ]
    return rows if rollout.negative_prompt == "" else [*rows, ("negative prompt", f"`{_shortened(rollout.negative_prompt)}`")]


# --- a cross-evaluation -----------------------------------------------------------------------------------------------------
def _entry(folder: Path, result: Mapping[str, Any], name: str | None) -> Mapping[str, Any] | None:
    """The checkpoint's entry in a cross-evaluation; None where it is missing or may be either of two."""
    run, epoch = folder.resolve().parent.parent.name, folder.name

    def is_it(model: Mapping[str, Any]) -> bool:
        return model["name"] == name if name else bool(model["run"]) and f"/{model['name']}".endswith(f"/{run}/{epoch}")

    found = [model for model in result["models"] if is_it(model)]
    return found[0] if len(found) == 1 else None


def _cross_eval(model: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    base = next(other for other in result["models"] if other["name"] == model["base"])
    rows = []
    for name in result["rewards"]:
        ours, theirs = model["rewards"][name], base["rewards"][name]
        trained = model.get("trained_weights") or [model["trained_reward"]]
        role = "trained" if name in trained else "constraint" if name in model.get("constraints", []) else ""
        numbers = (_number(theirs["mean"]), _number(ours["mean"]), tables.interval(ours["standardised"]), _percent(ours["win_rate"]))
        rows.append((f"`{_short(name)}`", role, *numbers))
    told = next((run["verdict"]["sentence"] for run in result["runs"] if run["run"] == model["run"]), None)
    level = f"{100 * result['bootstrap']['level']:g} %"
    how = (
        f"{len(result['prompts'])} prompts of `{_short(result['prompt_source'])}`, {result['per_prompt']} images each from the same noise as the "
        f"base model's, seed {result['seed']}. Differences are in standard deviations of the base's scores, with {level} intervals over prompts."
    )
    parts = ["## Cross-evaluation", how, _table(("reward", "", "base", "this", "difference", "better than the base"), rows)]
    if model.get("diversity_difference"):
        parts.append(f"Diversity against the base model: {tables.interval(model['diversity_difference'], 4)}.")
    if told:
        parts.append(f"Over the run's checkpoints: {told}.")
    return "\n\n".join(parts)


def _percent(one: Mapping[str, float | None] | None) -> str:
    return "-" if one is None or one["mean"] is None else f"{one['mean']:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


# --- words ------------------------------------------------------------------------------------------------------------------
def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(tables.markdown(columns, rows))


def _on_the_hub(base: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not base.startswith(".") and not Path(base).exists()


def _short(name: str) -> str:
    """A hub id or a word as it is; of a path, the last part: where a file lay is nobody's business on the hub."""
    return name if _on_the_hub(name) or not ("/" in name or Path(name).exists()) else name.rstrip("/").rpartition("/")[2]


def _shortened(text: str) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= PROMPT_LENGTH else f"{text[: PROMPT_LENGTH - 3]}..."
