"""What `tdpo score` is asked to do. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tdpo_cli import rewards
from tdpo_cli.errors import RequestError
from tdpo_cli.score import captions, score_file
from tdpo_cli.storage import outside

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class ScoreRequest:
    """Scores of a folder's images."""

    folder: Path  # its images, also those in folders below
    rewards: str = "all"  # `all`, or names with commas between them
    prompt: str | None = None  # one for all images
    prompts: Path | None = None  # a file: .txt, one line per image in name order; .jsonl or .csv
    variant: str = "tdpo"  # one of rewards.VARIANTS
    checkpoints: Mapping[str, str] = field(default_factory=dict)  # reward -> path or hub id, over the zoo's
    zoo: str | None = None  # `sandbox`: the embedded checkpoints
    out: Path | None = None  # a .jsonl or .csv; one that exists is continued; None: a new scores/FOLDER-0001.jsonl
    batch_size: int | None = None  # images per network call; None: by the device
    processes: int | None = None  # on `device`, or on the CPU
    gpus: int | None = None  # one process on each
    device: str | None = None  # None: a GPU where there is one
    dtype: str = "fp32"  # of the networks, one of DTYPES
    follow_links: bool = False  # also what lies outside the folder

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards, each once. Raises RequestError."""
        return reward_names(self.rewards)

    def check(self) -> None:
        """What can be said without torch and without reading the images. Raises RequestError."""
        names = self.names
        if self.variant not in rewards.VARIANTS:
            raise RequestError(f"--variant {self.variant}: expected {' or '.join(rewards.VARIANTS)}.")
        if self.dtype not in DTYPES:
            raise RequestError(f"--dtype {self.dtype}: expected {', '.join(DTYPES)}.")
        if self.zoo not in (None, "sandbox"):
            raise RequestError(f"--zoo {self.zoo}: expected sandbox.")
        for name in self.checkpoints:
            if name not in names:
                raise RequestError(f"--checkpoint {name}=...: {name} is not among --rewards {','.join(names)}.")
        if self.gpus is not None and (self.processes is not None or self.device is not None):
            raise RequestError("--gpus excludes --processes and --device: it takes the first N GPUs, one process each.")
        captions.check(self.folder, self.prompt, self.prompts)
        if self.out is not None:
            if not outside.is_text(str(self.out)):
                raise RequestError(f"--out {str(self.out)!r}: not UTF-8 text.")
            score_file.check_suffix(self.out)


def reward_names(wanted: str) -> tuple[str, ...]:
    """`all`, or names with commas between them, each once. Raises RequestError."""
    names: list[str] = []
    for name in wanted.split(","):
        names += rewards.LEARNED if name.strip() == "all" else [name.strip()] if name.strip() else []
    if not names:
        raise RequestError(f"--rewards {wanted!r}: no reward named; expected all, or some of {', '.join(rewards.names())}.")
    for name in names:
        rewards.check_name(name)
    return tuple(dict.fromkeys(names))
