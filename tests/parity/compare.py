"""The upstream packages' own code and ours on the same synthetic weights: `make parity` prints the differences.

    python tests/parity/compare.py .venv-parity/bin/python [full]

Theirs run in their own environment behind HTTP (upstream.py) and are asked as every reward at an address is; ours run here.
`full`: the published sizes, from specs beside the project ($TDPO_SHARED or ../shared); takes 12 GB of memory and disk.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "real"))

import test_reward_oracle as recipe  # noqa: E402

from tdpo_cli import rewards  # noqa: E402
from tdpo_cli.rewards.backbones import Backbones  # noqa: E402

TOLERANCE = {"aesthetic": 1e-5, "pickscore": 1e-4, "hpsv2": 1e-5, "imagereward": 1e-5}  # pickscore: 100 times a cosine
SIZES = ((224, 224), (512, 512), (640, 360), (149, 199), (100, 60))  # width, height
PROMPTS = ("a cat", "", "it's a \u201cred\u201d cube &amp; a Sphere, 35 mm", "very " * 90 + "long")


def main(upstream_python: str, size: str = "reduced") -> int:
    """Print one line per reward. -> 0 if all lie within the tolerance, else 1."""
    torch.set_num_threads(1)
    if size == "reduced":
        recipe.ORACLE = HERE / "specs"  # the weight recipe reads its key lists there
    elif not recipe.ORACLE.is_dir():
        raise SystemExit(f"compare.py: the full-size specs are not in {recipe.ORACLE}; set TDPO_SHARED")
    os.environ.setdefault("TDPO_REWARD_TIMEOUT", "1800")  # one full-size hpsv2 score loads its checkpoint anew
    print(f"{'reward':12s} {'scores':>6s} {'spread':>8s} {'largest difference':>19s} {'allowed':>8s} upstream")
    failed = False
    for reward, allowed in TOLERANCE.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pairs = _write(folder, reward, size)
            with served(upstream_python, reward, folder / reward) as theirs:
                expected = _scores(theirs, folder / "images", pairs)
            ours = rewards.load(reward, Backbones(), checkpoint=str(folder / reward), variant="package")
            difference = float(np.abs(np.subtract(_scores(ours, folder / "images", pairs), expected)).max())
        columns = f"{reward:12s} {len(pairs):6d} {np.std(expected):8.3f} {difference:19.1e} {allowed:8.0e}"
        print(f"{columns} {theirs.describe()['version']}", flush=True)
        failed |= not difference <= allowed
    return int(failed)


def _write(folder: Path, reward: str, size: str) -> list[tuple[str, str]]:
    """The checkpoint, the images and the pairs to score: all with all, or one prompt an image where that takes long."""
    recipe.write_checkpoint(reward, size, folder / reward)
    if reward == "imagereward":
        (folder / reward / "bert-base-uncased").mkdir()
        shutil.copy(folder / reward / "vocab.txt", folder / reward / "bert-base-uncased")
    (folder / "images").mkdir()
    names = [f"{width}x{height}.png" for width, height in SIZES]
    for name, (width, height) in zip(names, SIZES, strict=True):
        _image(width, height).save(folder / "images" / name)
    return list(itertools.product(names, PROMPTS)) if size == "reduced" else list(zip(names, itertools.cycle(PROMPTS)))


def _image(width: int, height: int) -> Image.Image:
    """A gradient, rings and a hard-edged checkerboard, one per channel."""
    y, x = np.mgrid[:height, :width]
    rings = ((2 * x - width) ** 2 + (2 * y - height) ** 2) // 40 % 256
    return Image.fromarray(np.stack([x * 255 // width, rings, (x // 7 + y // 5) % 2 * 255], axis=2).astype(np.uint8))


@contextlib.contextmanager
def served(python: str, reward: str, checkpoint: Path, program: Path = HERE / "upstream.py") -> Iterator[rewards.Reward]:
    """The upstream reward as a client sees it, while its server runs."""
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen([python, program, reward, checkpoint], stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            address = next((line.strip() for line in server.stdout if line.startswith("http://")), None)  # packages print, too
            if address is None:
                said.seek(0)
                raise SystemExit(f"compare.py: the upstream code failed on {reward}:\n{said.read().decode(errors='replace')}")
            yield rewards.load(address, Backbones())
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def _scores(reward: rewards.Reward, images: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """One at a time, of the pixels as they are: nothing is resized or rounded on the way."""
    scores = []
    for name, prompt in pairs:
        pixels = torch.from_numpy(np.array(Image.open(images / name)))
        scores.append(reward.score(pixels.permute(2, 0, 1)[None] / 255, [prompt]).item())
    return scores


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).exists():
        raise SystemExit("compare.py needs the Python of the upstream packages' environment; run it with: make parity")
    raise SystemExit(main(*sys.argv[1:]))
