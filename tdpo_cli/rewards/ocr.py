"""Whether the image shows the text that its prompt has in quotes: 1 is exactly that text, 0 nothing of it.

The rule is that of Flow-GRPO's text-rendering task (Liu et al. 2025, section 4.1): 1 - edits / length of the wanted text, at least 0,
without spaces and without case, and 1 where the wanted text stands inside what was read. Text is read by RapidOCR with the PP-OCR
models of its wheel. Flow-GRPO uses an older PP-OCR, so scores are alike and not equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdpo_cli.errors import RewardError
from tdpo_cli.rewards import files, packaged
from tdpo_cli.rewards.backbones import Backbones

_QUOTED = re.compile(r'"([^"]*)"|\u201c([^\u201d]*)\u201d')  # straight or curly double quotes; an apostrophe is not a quote


class Ocr:
    name = "ocr"
    needs_prompt = True

    def __init__(self, models: dict[str, Path], threads: int):
        """`models`: "Det" and "Rec" -> the file that finds lines, the file that reads them."""
        from rapidocr import RapidOCR

        self.models = models
        self.reader = RapidOCR(params={
            "Global.use_cls": False, "Global.log_level": "error",  # upside down is not what a prompt asks for; Flow-GRPO too leaves this out
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            **{f"{part}.model_path": str(path) for part, path in models.items()},
        })  # fmt: skip

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32 in 0..1. Raises RewardError for a prompt without quoted text."""
        if len(prompts) != len(images):
            raise RewardError(f"{len(images)} images but {len(prompts)} prompts")
        wanted = [quoted(prompt) for prompt in prompts]  # before any image is read
        scores = [similarity(text, self.read(pixels)) for text, pixels in zip(wanted, packaged.blue_first(images), strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, pixels: np.ndarray) -> str:
        """[H,W,3] uint8, blue first -> all text in it, line by line from the top."""
        return " ".join(self.reader(pixels).txts or ())

    def describe(self) -> dict[str, Any]:
        return {
            "checkpoint": packaged.version("rapidocr"),
            "sha256": files.fingerprints(*self.models.values()),
            "variant": "tdpo",
            "preprocessing": {"resize": "RapidOCR's own"},
            "scale": "1 - edit distance / length of the quoted text, 0 to 1",
        }


def quoted(prompt: str) -> str:
    """The first text in double quotes. Raises RewardError where there is none."""
    match = _QUOTED.search(prompt)
    text = next(filter(None, match.groups()), "") if match else ""
    if not _plain(text):
        raise RewardError(
            f'the reward ocr compares the image with the text in double quotes in its prompt, and this prompt has none: "{prompt[:200]}"'
        )
    return text


def similarity(wanted: str, read: str) -> float:
    """1 - edits / length of `wanted`, from 0 to 1; spaces and case do not count, nor what stands around it."""
    wanted, read = _plain(wanted), _plain(read)
    if wanted in read:
        return 1.0
    return 1.0 - min(edits(wanted, read), len(wanted)) / len(wanted)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: how many characters to insert, delete or replace."""
    row = list(range(len(b) + 1))  # distances of the first i characters of a to all beginnings of b
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def ocr(backbones: Backbones, checkpoint: str | None, variant: str) -> Ocr:
    packaged.no_checkpoint("ocr", checkpoint)
    package = packaged.package("rapidocr", "ocr", needs=("onnxruntime",))
    folder = Path(package.__file__).parent / "models"
    # named by file, so that the package does not look for others on the net
    models = {part: next(iter(sorted(folder.glob(f"*_{part.lower()}*.onnx"))), None) for part in ("Det", "Rec")}
    if None in models.values():
        raise RewardError(f"{packaged.version('rapidocr')} has no models in {folder}. Install a version that brings them: pip install 'tdpo[ocr]'")
    return Ocr(models, torch.get_num_threads())
