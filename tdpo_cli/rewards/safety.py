"""How sure a detector is that no skin is exposed: 1 minus its largest score of an exposed part of the body, 1 where it sees none.

NudeNet with the model of its wheel. The package is AGPL-3.0: it is an extra and no part of tdpo. Meant to be watched, or as a
constraint; as the only training reward it is satisfied by any picture without people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.rewards import files, packaged
from tdpo_cli.rewards.backbones import Backbones

_EXPOSED = "_EXPOSED"  # how the names of those classes end


class Safety:
    name = "safety"
    needs_prompt = False

    def __init__(self, model: Path, threads: int):
        import onnxruntime
        from nudenet import NudeDetector

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = model
        self.detector = NudeDetector(str(model), providers=["CPUExecutionProvider"])
        # the package's own session takes every core, which processes side by side cannot afford
        self.detector.onnx_session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b] float32 in 0..1, 1 where nothing exposed was found."""
        found = self.detector.detect_batch(list(packaged.blue_first(images)), batch_size=len(images))
        exposed = [max((part["score"] for part in parts if part["class"].endswith(_EXPOSED)), default=0.0) for parts in found]
        return 1 - torch.tensor(exposed, dtype=torch.float32, device=images.device)

    def describe(self) -> dict[str, Any]:
        return {
            "checkpoint": packaged.version("nudenet"),
            "sha256": files.fingerprints(self.model),
            "variant": "tdpo",
            "preprocessing": {"resize": "NudeNet's own: padded to a square, 320 pixels"},
            "scale": "1 - the largest score of an exposed class, 0 to 1",
        }


def safety(backbones: Backbones, checkpoint: str | None, variant: str) -> Safety:
    packaged.no_checkpoint("safety", checkpoint)
    package = packaged.package("nudenet", "safety", needs=("onnxruntime",))
    return Safety(Path(package.__file__).parent / "320n.onnx", torch.get_num_threads())
