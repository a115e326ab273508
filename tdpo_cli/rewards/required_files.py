"""Which files a checkpoint needs, which of them are on this disk, and the command that fetches the others. Downloads nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpo_cli.rewards import aesthetic, files, hpsv2, imagereward, pickscore
from tdpo_cli.rewards.networks import CLIP_HUB

_CLIP = (("config.json",), ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
_CLIP_TOKENIZER = ("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt")
# reward -> the hub ids of its files, each with what it must hold; of alternatives one is enough, and the first is fetched
_NEEDED = {
    "aesthetic": ((CLIP_HUB, _CLIP), (aesthetic.HEAD_HUB, ((aesthetic.HEAD_HUB_FILE, aesthetic.HEAD_FILE),))),
    "pickscore": ((pickscore.HUB, _CLIP), (pickscore.TOKENIZER_HUB, _CLIP_TOKENIZER)),
    "hpsv2": ((hpsv2.HUB, ((hpsv2.WEIGHTS["hpsv2"],),)),),
    "hpsv2.1": ((hpsv2.HUB, ((hpsv2.WEIGHTS["hpsv2.1"],),)),),
    "imagereward": (
        (imagereward.HUB, ((imagereward.WEIGHTS,), (imagereward.TEXT_CONFIG,))),
        (imagereward.VOCABULARY_HUB, ((imagereward.VOCABULARY,),)),
    ),
}
PUBLISHED = tuple(_NEEDED)


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    name: str
    source: str  # a hub id or a folder
    path: str | None  # where it is, None if it is not on this disk
    hub_id: str = ""  # where it can be had
    options: str = ""  # ... and how: more options of `hf download`


def of_reward(name: str, checkpoint: str | None = None) -> list[File]:
    """The files of a reward; none for rewards without weights. `checkpoint` as for `rewards.load`."""
    local = checkpoint is not None and files.is_local(checkpoint)
    if local and Path(checkpoint).expanduser().is_file():  # hpsv2's weights, or aesthetic's head beside the published CLIP
        given = File(Path(checkpoint).name, str(Path(checkpoint).parent), checkpoint)
        return [given, *(_hub_files(CLIP_HUB, _CLIP) if name == "aesthetic" else [])]
    found = []
    for position, (hub_id, needed) in enumerate(_NEEDED.get(name, ())):
        if local:
            found += _local_files(Path(checkpoint).expanduser(), hub_id, needed)
        else:  # another hub id stands for the first one; tokenizer, vocabulary and head stay where they are
            found += _hub_files(checkpoint if checkpoint and position == 0 else hub_id, needed)
    return found


def on_hub(hub_id: str, names: Sequence[str], revision: str | None = None, repo_type: str | None = None) -> list[File]:
    """Files of any repository, as far as the hub's cache has them."""
    return _hub_files(hub_id, [(name,) for name in names], revision, repo_type)


def _hub_files(hub_id: str, needed: Sequence[Sequence[str]], revision: str | None = None, repo_type: str | None = None) -> list[File]:
    from huggingface_hub import try_to_load_from_cache

    options = "".join(f" --{key} {value}" for key, value in (("repo-type", repo_type), ("revision", revision)) if value)
    result = []
    for names in needed:
        cached = [try_to_load_from_cache(hub_id, name, revision=revision, repo_type=repo_type) for name in names]
        path = next((path for path in cached if isinstance(path, str)), None)
        result.append(File(names[0], hub_id, path, hub_id, options))
    return result


def _local_files(folder: Path, hub_id: str, needed: Sequence[Sequence[str]]) -> list[File]:
    result = []
    for names in needed:
        path = next((str(folder / name) for name in names if (folder / name).is_file()), None)
        result.append(File(names[0], str(folder), path, hub_id, f" --local-dir {shlex.quote(str(folder))}"))
    return result


def commands(files_: Sequence[File]) -> list[str]:
    """What fetches those that are missing, one command per repository."""
    names: dict[tuple[str, str], list[str]] = {}
    for file in files_:
        if file.path is None:
            names.setdefault((file.hub_id, file.options), []).append(file.name)
    return [f"hf download {hub_id} {' '.join(dict.fromkeys(wanted))}{options}" for (hub_id, options), wanted in names.items()]
