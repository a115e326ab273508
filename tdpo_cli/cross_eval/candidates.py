"""What a cross-evaluation compares: base models, every checkpoint of runs, LoRA files; with the prompts and rewards they share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tdpo_cli import rewards
from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.models import checkpoints, lora_file
from tdpo_cli.models.checkpoints import Checkpoint, Source
from tdpo_cli.models.lora_file import FILE as LORA_FILE
from tdpo_cli.storage.run_dir import Manifest, RunDir, check_weights, epoch_name, hash_file


@dataclass(frozen=True)
class Sampling:
    """Everything that decides which image a prompt and its noise become."""

    checkpoint: Checkpoint
    steps: int
    guidance_scale: float
    noise: float | None  # eta (DDIM) or noise level (flow); None: the family's own
    negative_prompt: str

    def of_base(self) -> Sampling:
        """The same without weights: the base model."""
        return replace(self, checkpoint=replace(self.checkpoint, weights=None))

    def as_dict(self) -> dict[str, Any]:
        """As request.json holds it: flat."""
        flat = asdict(self)
        # what is not set is not written: a request of an older version, which knew neither, is still the same request
        checkpoint = {name: value for name, value in flat.pop("checkpoint").items() if value is not None or name not in ("vae", "resolution")}
        return {**{"start_from" if name == "weights" else name: value for name, value in checkpoint.items()}, **flat}

    @staticmethod
    def of(flat: Mapping[str, Any]) -> Sampling:
        """From request.json."""
        rest = {name: flat[name] for name in ("steps", "guidance_scale", "noise", "negative_prompt")}
        resolution = tuple(flat["resolution"]) if flat.get("resolution") else None
        weights = Checkpoint(flat["base"], flat["revision"], flat["dtype"], flat["start_from"], flat.get("vae"), resolution)
        return Sampling(weights, **rest)


@dataclass(frozen=True)
class Model:
    """One model to evaluate. `group` holds the checkpoints of one run together, or is the name of a checkpoint without a run."""

    name: str
    base: str | None  # the name of the base model it is compared with; None for a base model
    run: str | None
    epoch: int | None
    group: str | None
    algorithm: str | None
    trained_reward: str | None
    reward_queries: int | None
    updates: int | None
    sampling: Sampling
    sha256: dict[str, str]  # weights file -> hash
    weights: dict[str, float] = field(default_factory=dict)  # of the rewards that trained together; empty where one did, `trained_reward`
    constraints: list[str] = field(default_factory=list)  # rewards that were held above a bound

    def as_dict(self) -> dict[str, Any]:
        """As request.json holds it. What is empty is not written: a request of an older version is still the same request."""
        flat = {**asdict(self), "sampling": self.sampling.as_dict()}
        return {name: value for name, value in flat.items() if value or name not in ("weights", "constraints")}

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Model:
        """From request.json."""
        return Model(**{**entry, "sampling": Sampling.of(entry["sampling"])})

    def checked(self) -> Model:
        """Itself, if every value is of its kind. Raises ValueError: request.json may be damaged, or a stranger's."""
        how, weights = self.sampling, self.sampling.checkpoint
        texts = (self.name, weights.base, weights.dtype, how.negative_prompt)
        maybe = (self.base, self.run, self.group, self.algorithm, self.trained_reward, weights.revision, weights.weights, weights.vae)
        counts = (self.epoch, self.reward_queries, self.updates, how.steps, *(weights.resolution or (1, 1)))
        right = (
            all(isinstance(text, str) for text in (*texts, *(text for text in maybe if text is not None), *self.constraints)),
            all(type(count) is int and 0 <= count < 2**53 for count in counts if count is not None),
            how.steps is not None and 0 < how.steps <= 1000 and len(weights.resolution or (1, 1)) == 2,
            all(type(value) in (int, float) and abs(value) < 1e6 for value in (how.guidance_scale, how.noise or 0, *self.weights.values())),
            all(isinstance(text, str) for pair in (*self.sha256.items(), *((name, name) for name in self.weights)) for text in pair),
        )
        if not all(right):
            raise ValueError(f"{str(self.name)[:60]!r} has values of another kind")
        return self


@dataclass(frozen=True)
class Found:
    """What one argument names, before it has a name."""

    source: Source
    base: Sampling
    place: Path | None  # of the run, or of the weights; None for a base model and for a hub id
    run: RunDir | None = None
    epoch: int | None = None


def find(
    arguments: Sequence[str], preset_name: str | None, overrides: Sequence[tuple[str, Any]], epochs: Sequence[int]
) -> tuple[list[Model], list[Preset]]:
    """Base models first, then every checkpoint, run by run, by epoch; and the presets that say how. Raises RequestError."""
    found = named(arguments, preset_name, overrides, epochs)
    bases = list(dict.fromkeys(one.base for one in found))
    base_name = {base: "base" if number == 0 else f"base-{number + 1}" for number, base in enumerate(bases)}
    models = [Model(base_name[base], None, None, None, None, None, None, 0, 0, base, {}) for base in bases]
    names = _names([one.place for one in found if one.place], taken=set(base_name.values()))
    groups: dict[str, list[Model]] = {}
    for one in found:
        if one.place is not None or one.source.name != "base":
            group = names[one.place] if one.place else one.source.name
            groups.setdefault(group, []).append(_model(one, group, base_name[one.base]))
    for group in groups.values():
        models += sorted(group, key=lambda model: -1 if model.epoch is None else model.epoch)
    return models, [one.source.preset for one in found]


def named(arguments: Sequence[str], preset_name: str | None, overrides: Sequence[tuple[str, Any]], epochs: Sequence[int]) -> list[Found]:
    """What the arguments name, each once, in order. Raises RequestError."""
    found = [one for argument in arguments for one in _of(argument, preset_name, overrides, epochs)]
    return list({(one.source.preset.model.start_from or one.source.preset.model.base, one.place): one for one in found}.values())


def _of(argument: str, preset_name: str | None, overrides: Sequence[tuple[str, Any]], epochs: Sequence[int]) -> list[Found]:
    path = Path(argument)
    run = RunDir(path)
    if run.holds_a_run:
        folders = [run.checkpoint(epoch) for epoch in epochs] or run.checkpoints() or [run.checkpoint()]
        return [_of_run(run, folder, preset_name, overrides) for folder in folders]
    if epochs:
        raise RequestError(f"--epoch chooses checkpoints of run folders, and {argument} is none.")
    if (path / "manifest.json").is_file() and RunDir(path.parent.parent).holds_a_run:
        return [_of_run(RunDir(path.parent.parent), path, preset_name, overrides)]
    source = checkpoints.find(argument, preset_name, overrides)
    if source.preset.model.start_from is None and argument != "base":  # a whole model: compared with the preset's base model
        base = _sampling(checkpoints.find("base", preset_name, overrides))
        return [Found(source, base, path.resolve() if path.exists() else None)]
    place = None if argument == "base" else path.resolve()
    return [Found(source, _sampling(source).of_base(), place)]


def _of_run(run: RunDir, folder: Path, preset_name: str | None, overrides: Sequence[tuple[str, Any]]) -> Found:
    source = checkpoints.find(str(folder), preset_name, overrides)
    return Found(source, _sampling(source).of_base(), run.path.resolve(), run, int(folder.name.removeprefix("epoch_")))


def _sampling(source: Source) -> Sampling:
    shown = source.preset.shown
    return Sampling(source.checkpoint, shown.steps, shown.guidance_scale, shown.noise, source.preset.rollout.negative_prompt)


def _model(one: Found, group: str, base: str) -> Model:
    how, weights = _sampling(one.source), one.source.checkpoint.weights
    if weights is not None and lora_file.whole_network(Path(weights)) is None:
        lora_file.check(lora_file.find(Path(weights)))
    digests = hashes(weights)
    if one.run is None:
        return Model(group, base, None, None, group, None, None, None, None, how, digests)
    own = one.run.read_preset()
    row = next((row for row in one.run.read_metrics(own.rewards) if row["epoch"] == one.epoch), {})
    counts = {"reward_queries": own.rollout.samples_per_epoch, "updates": own.updates_per_epoch}  # per epoch, where the row is lost
    counts = {name: row.get(name, per_epoch * (one.epoch + 1)) for name, per_epoch in counts.items()}
    name = f"{group}/{epoch_name(one.epoch)}"
    return Model(
        name, base, group, one.epoch, group, own.algorithm.name, own.trained_words, **counts, sampling=how, sha256=digests,
        weights=own.reward.train_weights if len(own.weights) > 1 else {}, constraints=list(own.reward.at_least),
    )  # fmt: skip


def hashes(weights: str | None) -> dict[str, str]:
    """SHA-256 of the weights files: as the manifest beside them says, else computed. Raises RequestError."""
    if weights is None:
        return {}
    path = Path(weights)
    try:
        if path.is_file():
            return {path.name: hash_file(path)}
        if (path / "manifest.json").is_file():
            check_weights(path)
            return {
                name: digest for name, digest in Manifest.read(path).files.items() if name.endswith(".safetensors") and name != "critic.safetensors"
            }
        files = sorted(file for file in path.rglob("*.safetensors") if file.name != "critic.safetensors")
        return {str(file.relative_to(path)): hash_file(file) for file in files}
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None


def _names(places: Sequence[Path], taken: set[str]) -> dict[Path, str]:
    """Every place's shortest end of its path that no other one shares, and a number where even that is taken."""
    shown = {place: _shown(place).parts for place in places}
    names: dict[Path, str] = {}
    for place, parts in shown.items():
        others = [other for other in shown.values() if other != parts]
        lengths = [n for n in range(1, len(parts)) if parts[-n:] not in [other[-n:] for other in others] and "/".join(parts[-n:]) not in taken]
        name = "/".join(parts[-lengths[0] :] if lengths else parts[1:])
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        names[place] = next(one for one in numbered if one not in taken)
        taken = taken | {names[place]}
    return names


def _shown(place: Path) -> Path:
    """What a place is called: a LoRA file under the usual name like its folder, other files without their suffix."""
    if place.name == LORA_FILE:
        return place.parent
    return place.with_suffix("") if place.suffix == ".safetensors" else place


# --- what they share ------------------------------------------------------------------------------------------------------
def shared_prompt_source(given: str | None, presets: Sequence[Preset]) -> str:
    """Where the prompts come from. Raises RequestError."""
    sources = [given] if given else list(dict.fromkeys(one.rollout.eval_prompts for one in presets))
    if len(sources) > 1:
        raise RequestError(f"the runs name different rollout.eval_prompts ({', '.join(map(str, sources))}); say which with --prompts FILE.")
    if sources[0] is None:
        raise RequestError("rollout.eval_prompts is not set; give held-out prompts with --prompts FILE.")
    return sources[0]


def shared_rewards(wanted: str, presets: Sequence[Preset]) -> dict[str, str | None]:
    """Reward -> checkpoint (None: the published one). Raises RequestError for unknown names and checkpoints that differ."""
    paths = [rewards.checkpoints(one.reward.zoo, one.reward.checkpoints) for one in presets]
    names: list[str] = []
    for word in (word.strip() for word in wanted.split(",")):
        if word == "all":
            names += [name for one in presets for name in one.rewards]
            names += [name for name in rewards.LEARNED if any(name in known for known in paths)]
        elif word:
            names.append(word)
    if not names:
        raise RequestError(f"--rewards {wanted!r}: no reward named; expected all, or some of {', '.join(rewards.names())}.")
    chosen = {}
    for name in dict.fromkeys(names):
        rewards.check_name(name)
        known = list(dict.fromkeys(_resolved(paths_of_one.get(name)) for paths_of_one in paths))
        if len(known) > 1:
            shown = " and ".join(path or "the published checkpoint" for path in known)
            raise RequestError(f"the runs score {name} with different checkpoints ({shown}); say which with --checkpoint {name}=PATH.")
        chosen[name] = known[0]
    return chosen


def _resolved(path: str | None) -> str | None:
    return str(Path(path).expanduser().resolve()) if path is not None and Path(path).expanduser().exists() else path
