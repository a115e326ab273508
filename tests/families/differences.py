"""Print how far the product is from diffusers on tiny pipelines of the flow-matching families: the figures of docs/flow.md.

    python tests/families/differences.py FOLDER      # writes the pipelines that are not there yet

Largest differences over three prompts: of images without noise against the pipeline's own call, in levels of 255, and of encoded prompts.
"""

import sys
import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from conventions import CALLS
from make_tiny import build
from subject import GUIDANCE, PROMPTS, Case, levels

from tdpo_cli import models


@torch.no_grad()
def prompts(case: Case) -> float:
    """Of each prompt's own tokens."""
    ours = case.base.family.encode(PROMPTS).parts
    empty = {"prompt_2": None, "prompt_3": None} if "StableDiffusion3" in case.name else {"prompt_2": None} if case.name == "FluxPipeline" else {}
    # lists: Z-Image writes into the one that it is given
    theirs = case.plain.encode_prompt(list(PROMPTS), **empty)[0]
    return max((mine[: len(row)] - row).abs().max().item() for mine, row in zip(ours["embeds"], theirs, strict=True))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    print("pipeline         unguided   guided   prompts")
    for name in (name for name, entry in models.FAMILIES.items() if entry.diffusion == "flow"):
        for variant in (1, 2):
            path = folder / f"{CALLS[name].tiny}-{variant}"
            case = Case(path if path.exists() else build(CALLS[name].tiny, path, variant), name, folder)
            images = (levels(case.ours(case.base, guidance), case.theirs(case.plain, guidance)) for guidance in (1.0, GUIDANCE))
            print(f"{path.name:15}", *(f"{value:9.1e}" for value in (*images, prompts(case))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
