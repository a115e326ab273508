"""Facts about a run on SDXL that is cut up otherwise: the same run, as long as the reward does not jump.

`jpeg-incompressibility` counts whole bytes: a difference of the last bit in a picture becomes a difference of a byte in its reward, hundreds of
times larger (docs/decisions.md). So these runs train on a reward that is as smooth as the pictures are.
"""

import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from helpers import tdpo
from test_world_sizes import PRESET
from tolerances import assert_same_run

from tdpo_cli.config import preset as presets

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="writing tiny pipelines needs transformers 5")
SHORT = ("--set", "rollout.steps=3", "--set", "rollout.samples_per_epoch=8")
BRIGHTNESS = "def score(images, prompts):\n    return images.float().mean(dim=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
    import make_tiny

    folder = tmp_path_factory.mktemp("sdxl-processes")
    base = make_tiny.build("sdxl", folder / "sdxl-1", 1)
    (folder / "brightness.py").write_text(BRIGHTNESS)
    text = PRESET.replace('base = "sandbox"', f'base = "{base}"').replace('watch = ["gold"]', "watch = []")
    text = text.replace('prompts = "sandbox"', 'prompts = "simple-animals"')
    text = text.replace('train = "aesthetic"', f'train = "{folder / "brightness.py"}:score"')
    (folder / "tiny.toml").write_text(text)
    return folder


def rows(place, name, *arguments, run=None):
    """Train into place/NAME. -> its epochs' metrics, without timings"""
    arguments = ("train", "--preset", place / "tiny.toml", "--out", place / name, "--quiet", *arguments)
    done = run(*arguments) if run else tdpo(*arguments)
    status, said = (done.returncode, done.stderr) if run else (done.status, done.err)
    assert status == 0, said
    return tiny.rows(place / name)


def assert_same(place, ours, theirs):
    preset = presets.load(str(place / "tiny.toml"), [("rollout.eta", 1.0)])
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert_same_run(one, other, preset)


@pytest.mark.slow
def test_micro_batches_of_another_size_are_the_same_run(place):
    torch.set_num_threads(1)
    ours, theirs = (rows(place, f"cut-{size}", *SHORT, "--epochs", 2, "--set", f"run.micro_batch={size}") for size in (8, 3))
    assert ours != theirs, "other micro-batches round otherwise: nothing was compared"
    assert_same(place, ours, theirs)


@pytest.mark.slow
def test_one_process_and_two_are_the_same_run(place, nursery):
    (place / "seen").mkdir()
    spied = lambda *arguments: nursery.tdpo(*arguments, SPY_FOLDER=str(place / "seen"))  # these workers always report what they do
    ours = rows(place, "alone", *SHORT)
    theirs = rows(place, "two", *SHORT, "--processes", 2, "--set", "run.micro_batch=3", run=spied)
    assert ours != theirs
    assert_same(place, ours, theirs)
