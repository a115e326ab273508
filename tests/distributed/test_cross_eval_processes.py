"""A cross-evaluation does not depend on how many processes made it."""

import json
import os
import subprocess
import sys

from helpers import tdpo

PRESET = """
[model]
base = "sandbox"
lora_rank = 2
dtype = "fp32"
[rollout]
prompts = "sandbox"
eval_prompts = "sandbox"
samples_per_epoch = 4
steps = 2
guidance_scale = 1.0
[reward]
train = "aesthetic"
watch = ["gold"]
zoo = "sandbox"
min_count = 1
[algorithm]
name = "ddpo"
[update]
batch_size = 4
learning_rate = 2e-2
[run]
epochs = 2
preview_images = 0
"""


def test_two_processes_write_the_evaluation_of_one(tmp_path):
    (tmp_path / "tiny.toml").write_text(PRESET)
    run = tmp_path / "run"
    assert tdpo("train", "--preset", tmp_path / "tiny.toml", "--out", run).status == 0
    # eight prompts, one at once: 24 parts, of which the second process starts in the middle of a model
    settings = ["cross-eval", run, "--rewards", "aesthetic,gold", "--per-prompt", 2, "--batch-size", 2]
    one, two = (tmp_path / folder / "evaluation" for folder in ("one", "two"))
    alone = tdpo(*settings, "--out", one)
    assert alone.status == 0, alone.err
    command = [sys.executable, "-m", "tdpo_cli", *settings, "--out", two, "--processes", "2", "--json"]
    together = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["models"] == ["base", "run/epoch_0000", "run/epoch_0001"]
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    assert sum(name.endswith(".png") for name in names) == 3 * 8 * 2 + 1
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
