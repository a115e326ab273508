"""docs/architecture.md is true: its paths exist, and its examples of an algorithm, a reward and a family run."""

import re
import sys
import types
from typing import Literal

import pytest
import torch
from helpers import tdpo
from tiny import preset as tiny_preset
from tiny import rows

from tdpo_cli import algorithms, models, rewards
from tdpo_cli.config import settings
from tdpo_cli.config.settings import Model

TABLES = {"algorithms": (algorithms, "ALGORITHMS"), "rewards": (rewards, "_REWARDS"), "models": (models, "FAMILIES")}


@pytest.fixture(scope="module")
def page(request):
    return (request.config.rootpath / "docs/architecture.md").read_text()


def blocks(page):
    """File named in the first line -> code."""
    return {code.split("\n", 1)[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", page, re.S)}


@pytest.fixture
def added(page, monkeypatch):
    """The example's module and its line in the table, as if they were files of the package."""

    def add(file, room):
        name = file.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        exec(compile(blocks(page)[file], file, "exec"), vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        table_module, table = TABLES[room]
        monkeypatch.setattr(table_module, table, dict(getattr(table_module, table)))
        exec(blocks(page)[f"tdpo_cli/{room}/__init__.py"], vars(table_module))
        return module

    return add


def test_every_path_of_the_page_exists(page, root):
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)(?::\w+)?`", page))
    assert len(named) > 20
    assert not [path for path in named if not ((root / "tdpo_cli" / path).exists() or (root / path).exists())]


@pytest.mark.slow
def test_the_algorithm_of_the_page_trains(added, monkeypatch, tmp_path, request):
    request.addfinalizer(settings.hints_of.cache_clear)
    settings.hints_of.cache_clear()  # an earlier test has read which algorithms there are
    added("tdpo_cli/algorithms/centred.py", "algorithms")
    monkeypatch.setattr(settings, "ALGORITHMS", algorithms.ALGORITHMS)
    monkeypatch.setattr(settings, "AlgorithmName", Literal[tuple(algorithms.ALGORITHMS)])
    outcome = tdpo("train", "--preset", tiny_preset(tmp_path), "--algorithm", "centred", "--epochs", 1, "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert rows(tmp_path / "run")[0]["policy_grad_norm"] > 0


@pytest.mark.slow
def test_the_reward_of_the_page_trains(added, tmp_path):
    added("tdpo_cli/rewards/warmth.py", "rewards")
    settings = tiny_preset(tmp_path, reward__train="warmth", algorithm__name="ddpo")
    outcome = tdpo("train", "--preset", settings, "--epochs", 1, "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert -1 <= rows(tmp_path / "run")[0]["rewards/warmth/mean"] <= 1


@pytest.mark.slow
def test_the_family_of_the_page_is_stable_diffusion(added):
    def transition():
        policy = models.load(Model(base="sandbox", lora_rank=2, dtype="fp32"))
        policy.set_schedule(4)
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return policy.transition(x, torch.tensor([0, 3]), policy.encode(["a red circle", "a blue ring"]), torch.tensor([1, 0]), 3.0).mean

    theirs = transition()
    module = added("tdpo_cli/models/families/plain.py", "models")
    ours = transition()
    assert models.FAMILIES["StableDiffusionPipeline"].place.endswith("plain:Plain") and module.Plain.component == "unet"
    assert torch.equal(ours, theirs)
