"""Scores of all models -> the content of cross_eval.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdpo_cli import __version__
from tdpo_cli.cross_eval.candidates import Model
from tdpo_cli.overoptimisation import agreement, held_out, statistics

Scores = dict[str, np.ndarray]  # reward -> [P,I], NaN where a score is missing


def build(request: Mapping[str, Any], models: Sequence[Model], parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Everything that is known of the models: `parts` holds what was scored, by model, in the order of the prompts."""
    rewards, prompts, seed = list(request["rewards"]), request["prompts"], request["seed"]
    draws = statistics.resample(len(prompts), seed)
    raw = {model.name: {name: [row for part in parts[model.name] for row in part["scores"][name]] for name in rewards} for model in models}
    scores = {model: {name: np.array(rows, dtype=np.float64) for name, rows in columns.items()} for model, columns in raw.items()}
    distances = {name: _distances(parts[name]) for name in scores}
    standardised = {model.name: _standardised(scores[model.name], scores[model.base]) for model in models if model.base is not None}
    judged = {model.name: _judged(standardised[model.name], model) for model in models if model.base is not None}
    entries = [
        _entry(model, raw[model.name], scores, standardised.get(model.name, {}), judged.get(model.name, {}), distances, draws)
        for model in models
    ]  # fmt: skip
    agreed = {entry["name"]: entry["agreement"] for entry in entries}
    groups: dict[str, list[Model]] = {}
    for model in models:
        if model.group is not None:
            groups.setdefault(model.group, []).append(model)
    matrix = [[statistics.estimate(standardised[group[-1].name][name], draws) for name in rewards] for group in groups.values()]
    return {
        "tdpo": __version__,
        "seed": seed,
        "per_prompt": request["per_prompt"],
        "prompt_source": request["prompt_source"],
        "prompts": prompts,
        "rewards": rewards,
        "bootstrap": {"resamples": statistics.RESAMPLES, "level": statistics.LEVEL, "unit": "prompt"},
        "models": entries,
        "runs": [_run(name, group, standardised, judged, agreed[group[-1].name], draws) for name, group in groups.items()],
        "matrix": {"trained": list(groups), "evaluated": rewards, "standardised": matrix},
    }


def _standardised(scores: Scores, base: Scores) -> Scores:
    """The common scale: paired differences in units of the base's standard deviation; all missing where that is 0."""
    stds = {name: statistics.spread(values)["std"] for name, values in base.items()}
    return {name: (values - base[name]) / stds[name] if stds[name] else np.full_like(values, np.nan) for name, values in scores.items()}


def _judged(values: Scores, model: Model) -> Scores:
    """What judges a model: its training rewards as one, under `trained_reward`, and those that took no part in training."""
    if not model.weights and not model.constraints:
        return values
    rest = {name: column for name, column in values.items() if name not in (*model.weights, *model.constraints)}
    if not model.weights or not all(name in values for name in model.weights):
        return rest
    return {model.trained_reward: sum(weight * values[name] for name, weight in model.weights.items()) / sum(model.weights.values()), **rest}


def _distances(parts: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """[P], or None where diversity was not measured."""
    return None if any(part["distances"] is None for part in parts) else np.array([one for part in parts for one in part["distances"]])


def _entry(
    model: Model, raw: Mapping[str, Any], scores: Mapping[str, Scores], standardised: Scores, judged: Scores,
    distances: Mapping[str, np.ndarray | None], draws: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    own, far = scores[model.name], distances[model.name]
    rewards: dict[str, Any] = {}
    for name, values in own.items():
        rewards[name] = {**statistics.spread(values), "difference": None, "standardised": None, "win_rate": None}
        if model.base is not None:
            difference = values - scores[model.base][name]
            rewards[name]["difference"] = statistics.estimate(difference, draws)
            rewards[name]["standardised"] = statistics.estimate(standardised[name], draws)
            rewards[name]["win_rate"] = statistics.estimate(statistics.wins(difference), draws)
    compared = model.base is not None and far is not None
    return {
        "name": model.name,
        "base": model.base,
        "run": model.run,
        "epoch": model.epoch,
        "trained_reward": model.trained_reward,
        **_training(model),
        "algorithm": model.algorithm,
        "reward_queries": model.reward_queries,
        "updates": model.updates,
        "images": f"images/{model.name}",
        "scores": raw,
        "rewards": rewards,
        "diversity": None if far is None else statistics.estimate(far, draws),
        "diversity_difference": statistics.estimate(far - distances[model.base], draws) if compared else None,
        "prompts_all_rise": statistics.share_all_rise(standardised),
        "prompts_trained_rises_others_fall": statistics.share_trained_rises_others_fall(judged, model.trained_reward),
        "agreement": _agreement(model, scores, draws),
    }


def _agreement(model: Model, scores: Mapping[str, Scores], draws: np.ndarray) -> dict[str, Any] | None:
    """How alike the trained and the other learned rewards rank a prompt's images: the base's, the model's, the change."""
    if model.base is None:
        return None
    base = scores[model.base]
    units = {name: statistics.spread(base[name])["std"] or np.nan for name in model.weights if name in base}
    columns = [{name: values / units.get(name, 1.0) for name, values in scores[one].items()} for one in (model.base, model.name)]
    sums = [agreement.of_model(_judged(one, model), model.trained_reward) for one in columns]
    return None if any(one is None for one in sums) else agreement.change(*sums, draws)


def _run(
    name: str, group: Sequence[Model], standardised: Mapping[str, Scores], judged: Mapping[str, Scores],
    agreed: Mapping[str, Any] | None, draws: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    last = group[-1]
    peaks = {}
    for reward in standardised[last.name]:
        peak, numbers = statistics.peak_to_final(np.stack([standardised[model.name][reward] for model in group]), draws)
        peaks[reward] = {"peak_epoch": group[peak].epoch, **numbers}
    trained = last.trained_reward
    others = [statistics.mean_of_others(judged[model.name], trained) for model in group]
    since_base = since_best = best_epoch = None
    if others[0] is not None:
        nothing = np.zeros_like(others[0])  # the base on the common scale
        mine = np.stack([nothing, *(judged[model.name][trained] for model in group)])
        best, since_best = statistics.since_best(mine, np.stack([nothing, *others]), draws)
        since_base = {"trained": statistics.estimate(mine[-1], draws), "others": statistics.estimate(others[-1], draws)}
        best_epoch = None if best == 0 else group[best - 1].epoch
    return {
        "run": name,
        "base": last.base,
        "algorithm": last.algorithm,
        "trained_reward": trained,
        **_training(last),
        "models": [model.name for model in group],
        "peak_to_final": peaks,
        "since_base": since_base,  # change of the trained reward and of the mean of the other learned ones, common scale
        "since_best": None if since_best is None else {"epoch": best_epoch, **since_best},
        "verdict": held_out.verdict(trained, draws.shape[1], since_base, best_epoch, since_best, agreed, last.constraints).as_dict(),
    }


def _training(model: Model) -> dict[str, Any]:
    """What took part in training beside one reward; nothing in the usual case."""
    both = {"trained_weights": model.weights, "constraints": model.constraints}
    return {name: value for name, value in both.items() if value}
