"""Time the engine of `tdpo score` against the loop a user would write with the same network, on files of mixed sizes.

    python benchmarks/score.py --json
    python benchmarks/score.py --images 100 --rounds 3 --processes 2

The loops use transformers and open_clip with their own image processors: one image at a time, and in batches. Loading is not timed.
Scores are compared first. Where they differ by more than the tolerance, no time is taken and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pairs import compared, facts, in_turn, show  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from tdpo_cli import rewards  # noqa: E402
from tdpo_cli.config import prompts as prompt_sources  # noqa: E402
from tdpo_cli.rewards.backbones import Backbones  # noqa: E402
from tdpo_cli.sandbox import ZOO  # noqa: E402
from tdpo_cli.score.captions import Item  # noqa: E402
from tdpo_cli.score.score import BATCH_SIZE  # noqa: E402
from tdpo_cli.score.workers import Team, Work, team  # noqa: E402

# Resized to 32 pixels, the longer side is even in all of them: the central crops of transformers and of torchvision agree.
SIZES = ((512, 512), (768, 512), (640, 480), (480, 640), (1024, 1024), (512, 768), (256, 256), (1280, 720))
PNG_EVERY = 4  # the others are JPEG
# torchvision's resizer is up to a grey level from Pillow's; the sandbox's networks amplify that
TOLERANCE = 0.02  # of the scores' standard deviation, for the mean difference
Loop = Callable[[Sequence[Path], Sequence[str]], list[float]]


# --- files --------------------------------------------------------------------------------------------------------------
def write_files(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Images with structure at every scale, as a photograph has, so that decoders do their usual work."""
    paths, dice = [], np.random.default_rng(seed)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        picture = np.zeros((height, width, 3))
        for scale, strength in ((64, 1.0), (16, 0.5), (4, 0.2), (1, 0.05)):
            coarse = dice.integers(0, 256, (-(-height // scale), -(-width // scale), 3), dtype=np.uint8)
            picture += strength / 1.75 * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        suffix, options = (".png", {}) if number % PNG_EVERY == 0 else (".jpg", {"quality": 92})
        paths.append(folder / f"{number:05d}{suffix}")
        Image.fromarray(picture.astype(np.uint8)).save(paths[-1], **options)
    return paths


def opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


# --- the loops a user would write -----------------------------------------------------------------------------------------
def batched(score: Callable[[list[Image.Image], list[str]], Tensor], batch_size: int) -> Loop:
    """Open a batch of files, score it, next batch."""

    @torch.no_grad()
    def loop(paths: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(paths), batch_size):
            images = [opened(path) for path in paths[start : start + batch_size]]
            found += score(images, list(prompts[start : start + batch_size])).tolist()
        return found

    return loop


def aesthetic(folder: Path) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """transformers' CLIPModel and CLIPProcessor, and the head as its own repository has it."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    head = rewards.load("aesthetic", Backbones(), checkpoint=str(folder)).head.layers
    return lambda images, prompts: head(normalize(_pooled(model.get_image_features(**processor(images=images, return_tensors="pt")))))[:, 0]


def pickscore(folder: Path) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """As the example of PickScore's model card: processor, both towers, the cosine."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = processor(images=images, return_tensors="pt")
        words = processor(text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        seen, read = _pooled(model.get_image_features(**pixels)), _pooled(model.get_text_features(**words))
        return (normalize(seen) * normalize(read)).sum(1)

    return score


def hpsv2(folder: Path) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """open_clip's network and tokenizer, and its transform for evaluation."""
    import open_clip
    from open_clip.transform import image_transform

    config = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"]).eval()
    state = torch.load(folder / "HPS_v2_compressed.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    how = config["preprocess_cfg"]
    transform = image_transform(model.visual.image_size, is_train=False, mean=how["mean"], std=how["std"], interpolation="bicubic")
    tokenizer = open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        seen = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        return (seen * model.encode_text(tokenizer(prompts), normalize=True)).sum(1)

    return score


def imagereward(folder: Path) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """transformers' BLIP towers with the image-reward package's torchvision transform and a BertTokenizer."""
    from torchvision import transforms
    from transformers import BertTokenizerFast

    reward = rewards.load("imagereward", Backbones(), checkpoint=str(folder))
    vision, text, head = reward.blip.vision, reward.blip.text, reward.head.layers
    transform = transforms.Compose([
        transforms.Resize(reward.blip.image_size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(reward.blip.image_size),
        transforms.ToTensor(), transforms.Normalize(reward.blip.mean, reward.blip.std),
    ])  # fmt: skip
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)

    def score(images: list[Image.Image], prompts: list[str]) -> Tensor:
        seen = vision(pixel_values=torch.stack([transform(image) for image in images])).last_hidden_state
        words = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        states = text(input_ids=words["input_ids"], attention_mask=words["attention_mask"], encoder_hidden_states=seen).last_hidden_state
        return head(states[:, 0])[:, 0]

    return score


LOOPS = {"aesthetic": aesthetic, "pickscore": pickscore, "hpsv2": hpsv2, "imagereward": imagereward}


def _pooled(features: Any) -> Tensor:
    """transformers 5 gives an object where 4 gave the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


# --- the measurement ------------------------------------------------------------------------------------------------------
def engine(scorers: Team, items: Sequence[Item], names: Sequence[str]) -> dict[str, list[float]]:
    """Scores by reward, in the order of the items. RuntimeError where one is missing."""
    rows = [row for chunk, _ in scorers.score(items, lambda done: None) for row in chunk]
    if any(row[name] is None for row in rows for name in names):
        raise RuntimeError("the engine left an image without a score")
    return {name: [row[name] for row in rows] for name in names}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean difference in standard deviations of their scores."""
    theirs_ = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs_).mean() / theirs_.std())


def measure(names: Sequence[str], paths: Sequence[Path], batch_size: int, rounds: int, processes: int) -> dict[str, Any]:
    """Per set of rewards: the differences of scores, and the times where they agree."""
    folder, known = paths[0].parent, prompt_sources.load("sandbox:all")
    prompts = random.Random(0).choices(known, k=len(paths))
    items = [Item(path.name, prompt) for path, prompt in zip(paths, prompts, strict=True)]
    scores = {name: LOOPS[name](ZOO / name) for name in names}
    one, many = ({name: batched(score, size) for name, score in scores.items()} for size in (1, batch_size))
    report: dict[str, Any] = {}
    for group in [*((name,) for name in names), *([tuple(names)] if len(names) > 1 else [])]:
        checkpoints = rewards.checkpoints("sandbox", {})
        work = Work(folder, group, checkpoints, "tdpo", "fp32", ("cpu",) * processes, BATCH_SIZE["cpu"])
        with team(work) as scorers:
            ours = engine(scorers, items, group)  # which also loads the networks of every process
            found = {name: max(difference(ours[name], loop[name](paths, prompts)) for loop in (one, many)) for name in group}
            held = report["+".join(group)] = {"difference": found, "agree": all(value <= TOLERANCE for value in found.values())}
            if held["agree"]:
                times = in_turn({
                    "tdpo": lambda scorers=scorers, group=group: engine(scorers, items, group),
                    "one at a time": lambda group=group: [one[name](paths, prompts) for name in group],
                    f"batches of {batch_size}": lambda group=group: [many[name](paths, prompts) for name in group],
                }, rounds)  # fmt: skip
                held["times"] = compared(times, "tdpo", len(paths))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", default=",".join(LOOPS), help="names with commas between them")
    parser.add_argument("--images", type=int, default=500, help="files of mixed sizes")
    parser.add_argument("--batch", type=int, default=32, help="images per batch of the batched loop; the engine's is the command's default")
    parser.add_argument("--rounds", type=int, default=3, help="paired runs")
    parser.add_argument("--processes", type=int, default=1, help="of the engine; the loops always have one")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    names = options.rewards.split(",")
    if unknown := set(names) - set(LOOPS):
        parser.error(f"--rewards: {', '.join(sorted(unknown))} unknown; expected some of {', '.join(LOOPS)}")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), options.images)
        report = measure(names, paths, options.batch, options.rounds, options.processes)
    if options.json:
        print(json.dumps({**facts(), "images": options.images, "rounds": options.rounds, "processes": options.processes, "rewards": report}))
    else:
        for group, one in report.items():
            show(f"{group}: difference {max(one['difference'].values()):.1e} standard deviations", one.get("times", {}))
    wrong = [group for group, one in report.items() if not one["agree"]]
    for group in wrong:
        print(f"{group}: the scores differ, so no time was taken: {report[group]['difference']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
