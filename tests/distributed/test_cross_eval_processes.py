"""A cross-evaluation does not depend on how many processes made it."""

import json

import pytest
import tiny
from helpers import tdpo

CHANGES = {
    "rollout__eval_prompts": "sandbox", "reward__train": "aesthetic", "reward__watch": ["gold"], "algorithm__name": "ddpo",
    "update__batch_size": 4, "update__learning_rate": 2e-2, "run__epochs": 2,
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_write_the_evaluation_of_one(nursery, tmp_path):
    run = tmp_path / "run"
    assert tdpo("train", "--preset", tiny.preset(tmp_path, **CHANGES), "--out", run).status == 0
    # eight prompts, one at once: 24 parts, of which the second process starts in the middle of a model
    settings = ["cross-eval", run, "--rewards", "aesthetic,gold", "--per-prompt", 2, "--batch-size", 2]
    one, two = (tmp_path / folder / "evaluation" for folder in ("one", "two"))
    alone = tdpo(*settings, "--out", one)
    assert alone.status == 0, alone.err
    together = nursery.tdpo(*settings, "--out", two, "--processes", "2", "--json", worker="worker.py")
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["models"] == ["base", "run/epoch_0000", "run/epoch_0001"]
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    assert sum(name.endswith(".png") for name in names) == 3 * 8 * 2 + 1
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
