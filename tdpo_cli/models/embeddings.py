"""The embeddings of a run's prompts: each is computed once and kept on disk, then the text encoders are released.

A start that finds all of them does not read the text encoders at all. Prompts are encoded one at a time, so that an embedding
does not depend on what else was kept: a run is the same with a full cache, an empty one and none.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.console import size
from tdpo_cli.errors import RequestError, WorkError, first_line
from tdpo_cli.models.embedding_store import Damaged, Store
from tdpo_cli.models.family import Family
from tdpo_cli.types import Conditioning

NEGATIVE, PROMPT = "negative\n", "prompt\n"  # a family may encode the same words in two ways


@dataclass
class Embeddings:
    """`prompts(family)` are those that the run will use. One process of a machine fills the store in its `turn`, before the others."""

    store: Store
    limit: int  # bytes of the store; 0: nothing is kept
    prompts: Callable[[Family], Sequence[str]] = lambda family: ()
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    say: Callable[[str], None] = lambda text: None
    rows: dict[str, Conditioning] = field(default_factory=dict)  # in main memory, mostly mapped from files
    words: str = "encoded each epoch; text encoders stay loaded"  # what became of them, for the header

    def fill(self, family: Family, source: str, model: Model, negative: str) -> None:
        """Find the embeddings of the run's prompts, compute the missing ones, release the text encoders."""
        if not self.limit:
            return
        wanted = [NEGATIVE + negative, *(PROMPT + prompt for prompt in dict.fromkeys(self.prompts(family)))]
        with self.turn():
            self._find(key_of(self.store, family, source, model), wanted)
            missing = [name for name in wanted if name not in self.rows]
            if missing and not self._compute(family, source, model, wanted, missing):
                return
        family.release_text_encoders()
        total = sum(part.nbytes for name in wanted for part in self.rows[name].parts.values())
        done = "released" if missing else "not loaded"
        self.words = f"{len(wanted) - 1} prompts, {size(total)}; text encoders {done}"

    def encode(self, family: Family, prompts: Sequence[str], negative: bool = False) -> list[Conditioning]:
        """A row for each prompt, in main memory or on the device; with `negative` as the unconditional half of guidance."""
        kind = NEGATIVE if negative else PROMPT
        missing = [prompt for prompt in prompts if kind + prompt not in self.rows]
        computed = {}
        if missing:
            family.read_text_encoders()
            with torch.no_grad(), family.encoding():
                computed = {prompt: row_of(family, kind + prompt) for prompt in missing}
        return [self.rows[kind + prompt] if kind + prompt in self.rows else computed[prompt] for prompt in prompts]

    def _find(self, key: str | None, wanted: Sequence[str]) -> None:
        for name in wanted if key else ():
            try:
                if (parts := self.store.read(key, name)) is not None:
                    self.rows[name] = Conditioning(parts)
            except Damaged as error:
                self.say(f"{first_line(error)}: a damaged embedding, computed again")

    def _compute(self, family: Family, source: str, model: Model, wanted: Sequence[str], missing: Sequence[str]) -> bool:
        """Encode and keep what is missing. -> False where there is no room: then the text encoders stay."""
        family.read_text_encoders()
        key = key_of(self.store, family, source, model)  # now that all files are here
        missing = sorted(missing, key=lambda name: -len(name))  # the longest first: few families pad to one length
        with torch.no_grad(), family.encoding():
            rows = {missing[0]: row_of(family, missing[0])}
            most = len(wanted) * sum(part.nbytes for part in rows[missing[0]].parts.values())
            if most > self.limit:
                self.say(
                    f"the embeddings of {len(wanted) - 1} prompts need about {size(most)} and run.cache_limit is {size(self.limit)}: none are kept, "
                    "and the text encoders stay in main memory"
                )
                return False
            self.say(f"encoding {len(missing)} texts, once; about {size(most)} are kept in {self.store.folder}")
            if key is not None:
                self.store.make_room(most, self.limit, {self.store.file(key, name) for name in wanted})
            for name in missing:
                row = rows.pop(name, None) or row_of(family, name)
                self.rows[name] = self._kept(key, name, Conditioning({part: tensor.cpu() for part, tensor in row.parts.items()}))
        return True

    def _kept(self, key: str | None, name: str, row: Conditioning) -> Conditioning:
        """The row as it is on disk now; where it cannot be written, the row itself, which this process keeps in memory."""
        if key is None or not self.limit:
            return row
        try:
            self.store.write(key, name, row.parts)
            return Conditioning(self.store.read(key, name) or row.parts)
        except (WorkError, RequestError, Damaged, OSError) as error:
            self.say(f"embeddings are not kept on disk: {first_line(error)}")
            self.limit = 0
            return row


def row_of(family: Family, name: str) -> Conditioning:
    if name.startswith(NEGATIVE):
        return family.encode_negative(name.removeprefix(NEGATIVE))
    return family.encode([name.removeprefix(PROMPT)])


def key_of(store: Store, family: Family, source: str, model: Model) -> str | None:
    """A digest of all that an embedding depends on beside its prompt. None where the text encoders' files are not here yet."""
    folder, files = models.folder_of(source, model.revision), {}
    try:
        for part in models.text_parts(models.index(source, model.revision), model.drop_t5):
            if not (folder / part).is_dir():
                return None
            inside = sorted(path for path in (folder / part).iterdir() if path.is_file())
            files[part] = store.file_digests(inside)
    except (OSError, RequestError, WorkError):
        return None
    device = family.device
    facts = {
        "files": files,
        "family": [type(family).__name__, hashlib.sha256(Path(inspect.getfile(type(family))).read_bytes()).hexdigest()],
        "shape": list(family.latent_shape),
        "precision": [model.dtype if device.type != "cpu" else "fp32", model.quantise, model.tf32],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
