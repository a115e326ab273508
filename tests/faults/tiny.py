"""The smallest run that has every part: four samples, two steps, a critic, resets."""

import json

PRESET = """
[model]
base = "sandbox"
lora_rank = 2
dtype = "fp32"
[rollout]
prompts = "sandbox"
samples_per_epoch = 4
steps = 2
guidance_scale = 1.0
[reward]
train = "gold"
zoo = "sandbox"
min_count = 1
[algorithm]
critic_init_std = 0.11
reset_every = 2
[update]
batch_size = 2
learning_rate = 5e-3
[run]
epochs = 3
preview_images = 0
"""
UPDATES = 2 * 2  # steps x batches, per epoch
TIMING = ("seconds/", "images_per_second", "peak_memory_bytes")


def preset(folder, text=PRESET):
    file = folder / "tiny.toml"
    file.write_text(text)
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
