"""The smallest run that has every part - four samples, two steps, a critic, resets - as it is or with changes, and what is read of a run."""

import json

SETTINGS = {
    "model": {"base": "sandbox", "lora_rank": 2, "dtype": "fp32"},
    "rollout": {"prompts": "sandbox", "samples_per_epoch": 4, "steps": 2, "guidance_scale": 1.0},
    "reward": {"train": "gold", "zoo": "sandbox", "min_count": 1},
    "algorithm": {"critic_init_std": 0.11, "reset_every": 2},
    "update": {"batch_size": 2, "learning_rate": 5e-3},
    "run": {"epochs": 3, "preview_images": 0},
}
TIMING = ("seconds/", "images_per_second", "peak_memory_bytes")


def preset(folder, **changes):
    """FOLDER/tiny.toml with `section__key=value` on top. -> the file"""
    settings = {section: dict(keys) for section, keys in SETTINGS.items()}
    for name, value in changes.items():
        section, key = name.split("__")
        settings[section][key] = value
    lines = []
    for section, keys in settings.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]  # all of JSON but null is TOML too
    file = folder / "tiny.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def rows(run, timings=False):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found if timings else [{key: value for key, value in row.items() if not key.startswith(TIMING)} for row in found]


def outcome_of(run):
    """What must not depend on how a run went: rows without timings, and weights."""
    weights = {str(file.relative_to(run)): file.read_bytes() for file in run.glob("checkpoints/*/*.safetensors")}
    return rows(run), weights


def leftovers(run):
    return [str(path.relative_to(run)) for path in run.rglob(".*.tmp")]
