"""Model families and policies. Here the table of families; imports no torch.

A new family is one file in `families/` and one line in `FAMILIES`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdpo_cli.errors import RequestError, first_line
from tdpo_cli.sandbox import EMBEDDED, ZOO

if TYPE_CHECKING:
    from tdpo_cli.config.settings import Model
    from tdpo_cli.models.policy import Policy


@dataclass(frozen=True)
class FamilyEntry:
    """What is known of a family before its file is imported."""

    place: str  # module:class of the Family
    title: str  # for messages and the header
    diffusion: str  # ddim | flow: which sampler serves it, and so which noise settings apply
    optional_t5: bool = False  # model.drop_t5 applies
    tiny_vae: bool = True  # there are AutoencoderTiny for its latents
    needs: str = "0.32"  # the first diffusers whose pipeline of it is the one that the family was checked against


# by diffusers' pipeline class, as model_index.json names it
FAMILIES = {
    "StableDiffusionPipeline": FamilyEntry("tdpo_cli.models.families.sd:StableDiffusion", "Stable Diffusion 1.x and 2.x", "ddim"),
    "StableDiffusion3Pipeline": FamilyEntry("tdpo_cli.models.families.sd3:StableDiffusion3", "Stable Diffusion 3 and 3.5", "flow", optional_t5=True),
    "FluxPipeline": FamilyEntry("tdpo_cli.models.families.flux:Flux", "FLUX.1", "flow"),
    "Flux2KleinPipeline": FamilyEntry("tdpo_cli.models.families.flux2:Flux2Klein", "FLUX.2 klein", "flow", tiny_vae=False, needs="0.37"),
    "ZImagePipeline": FamilyEntry("tdpo_cli.models.families.z_image:ZImage", "Z-Image", "flow", needs="0.39"),
    "QwenImagePipeline": FamilyEntry("tdpo_cli.models.families.qwen_image:QwenImage", "Qwen-Image", "flow", tiny_vae=False, needs="0.37"),
    "StableDiffusionXLPipeline": FamilyEntry("tdpo_cli.models.families.sdxl:StableDiffusionXL", "Stable Diffusion XL", "ddim"),
}
T5 = ("text_encoder_3", "tokenizer_3")  # of Stable Diffusion 3: the parts that model.drop_t5 leaves out
# words in a model's name that say it was distilled to few steps
DISTILLED = ("schnell", "turbo", "lightning", "lcm", "hyper")


def load(model: Model, **options: Any) -> Policy:
    """The policy that a preset's [model] section names; options as for `loading.load`. Raises RequestError."""
    from tdpo_cli.models import loading

    return loading.load(model, **options)


def resolve(base: str) -> str:
    """The word of an embedded model, such as `sandbox`, as its folder; everything else as it is."""
    return str(ZOO / EMBEDDED[base]) if base in EMBEDDED else base


def family_of(source: str, revision: str | None = None) -> FamilyEntry:
    """The family of a diffusers folder or hub id, by its model_index.json. Raises RequestError."""
    return FAMILIES[pipeline_class(source, index(source, revision))]


def pipeline_class(source: str, content: dict) -> str:
    """The key of FAMILIES for a model_index.json. Raises RequestError."""
    name = content.get("_class_name", "?")
    if not isinstance(name, str):
        raise RequestError(f"{source}: its model_index.json names no pipeline class (_class_name is {str(name)[:60]}).")
    if name in FAMILIES:
        return name
    # Safe, img2img and other pipelines around the same networks; their UNet says whether it fits
    if name.startswith("StableDiffusionXL"):
        return "StableDiffusionXLPipeline"
    if name.startswith("StableDiffusion") and "XL" not in name and not name.startswith("StableDiffusion3"):
        return "StableDiffusionPipeline"
    supported = "; ".join(f"{entry.title} ({name})" for name, entry in FAMILIES.items())
    raise RequestError(f"{source}: a {name} is not supported. Supported: {supported}.")


def check_installed(source: str, entry: FamilyEntry) -> None:
    """RequestError where the installed diffusers is older than the family needs."""
    import importlib.metadata  # here, because it is slow to import

    here = importlib.metadata.version("diffusers")
    numbers = lambda version: tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers(here) < numbers(entry.needs):
        raise RequestError(f"{source}: {entry.title} needs diffusers >= {entry.needs}, here is {here}: pip install -U diffusers")


def check_trainable(source: str, content: dict, allow_distilled: bool) -> None:
    """RequestError for a model that can be sampled and should not be trained: distilled to few steps, or made to edit images."""
    name = str(content.get("_class_name", "?"))
    if "Img2Img" in name or "Inpaint" in name or "InstructPix2Pix" in name:
        raise RequestError(
            f"{source}: a {name}, made to change images. Only text-to-image models are trained. If its networks are those of one, "
            f"say so in its model_index.json: _class_name {pipeline_class(source, content)}."
        )
    reason = distilled(source, content)
    if reason is not None and not allow_distilled:
        raise RequestError(
            f"{source}: distilled to few steps ({reason}). Steps with noise are not what it learnt, and training undoes the distillation: "
            "train the model that it was made from, or train this one all the same with --allow-distilled."
        )


def distilled(source: str, content: dict) -> str | None:
    """What says that a model was distilled: its model_index.json or its name; nothing else does. None: nothing says so."""
    if content.get("is_distilled"):
        return "its model_index.json says is_distilled"
    name = source.rstrip("/").rpartition("/")[2]
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    found = next((word for word in DISTILLED if word in words), None)
    return None if found is None else f"its name says {found}"


def index(source: str, revision: str | None = None) -> dict:
    """The content of a model's model_index.json, which the hub is asked for. Raises RequestError."""
    file = _index_file(source, revision)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file}: damaged: {error}. Copy or download the model again.") from None


def folder_of(source: str, revision: str | None = None) -> Path:
    """Where the files of a model are on this disk: its folder, or the hub cache's of that revision. Raises RequestError."""
    return _index_file(source, revision).parent


def text_parts(content: dict, drop_t5: bool = False) -> list[str]:
    """The text encoders and tokenizers that a model_index.json lists."""
    given = [name for name, entry in content.items() if isinstance(entry, list) and entry and entry[-1] is not None]
    return [name for name in given if name.startswith(("text_encoder", "tokenizer")) and not (drop_t5 and name in T5)]


def check_source(source: str) -> None:
    """RequestError for a base model that is neither on this disk nor has the form of a hub id."""
    folder = Path(source)
    if not folder.exists() and (folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1):
        raise RequestError(f"{source}: no such model folder, and not a hub id (owner/name) either.")


# how the tensors of a single-file checkpoint are called, by the pipeline that they belong to
SINGLE_FILES = {
    "StableDiffusionXLPipeline": "conditioner.embedders.",
    "StableDiffusion3Pipeline": "model.diffusion_model.joint_blocks.",
    "FluxPipeline": "double_blocks.",
}


def single_file_class(file: Path) -> str:
    """The pipeline class of a checkpoint in one file, by its header's tensor names; where it has none, by its own name."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            names = json.loads(opened.read(length)) if length < 10**8 else {}
        found = next((cls for cls, prefix in SINGLE_FILES.items() if any(prefix in name for name in names)), None)
    except (OSError, ValueError, TypeError):
        found = None
    return found or ("StableDiffusionXLPipeline" if "xl" in file.stem.lower() else "StableDiffusionPipeline")


def _index_file(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise RequestError(f"{folder}: no model_index.json there, so it is not a diffusers model folder. Give the folder that holds it.")
        return folder / "model_index.json"
    if folder.is_file():
        new = folder.with_suffix("")
        code = f"from diffusers import {single_file_class(folder)} as P; P.from_single_file({str(folder)!r}).save_pretrained({str(new)!r})"
        raise RequestError(
            f"{folder}: a single file, expected a diffusers folder. Convert it once, then give {new}:\n"
            f'python -c "{code}"\n'
            "It reads the model's configs from the hub. Without a network add, behind the file's name, config=FOLDER, "
            "where FOLDER is a diffusers folder of the same kind."
        )
    check_source(source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "model_index.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason, at = first_line(error), f" --revision {revision}" if revision else ""
        raise RequestError(
            f"{source}: no such folder, and the hub did not give it: {reason}\nFetch it with: hf download {source}{at}\n"
            "or give a folder: --set model.base=PATH"
        ) from None
