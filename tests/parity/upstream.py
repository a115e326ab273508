"""The upstream packages' own code behind HTTP: `python upstream.py REWARD FOLDER` serves the checkpoint that compare.py wrote there.

Prints the address in one line once the networks are loaded, and answers until it is ended. Runs in .venv-parity, where tdpo
is not installed. The packages build full-size networks from fixed names; their own classes are built here in the sizes of the
synthetic checkpoints instead. Nothing else of theirs is replaced.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from server import server  # noqa: E402

Score = Callable[[Image.Image, str], float]
PACKAGES = {
    "hpsv2": ("hpsv2",), "imagereward": ("image-reward",), "aesthetic": ("image-reward", "openai-clip"), "pickscore": ("transformers",),
}  # fmt: skip


def hpsv2(folder: Path) -> Score:
    """hpsv2.img_score.score, but without the 4 GB of LAION weights that it loads and overwrites at once."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    if (folder / "open_clip_config.json").exists():
        factory._MODEL_CONFIGS["ViT-H-14"] = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, pretrained, **options: create(name, None, **options)
    return lambda image, prompt: float(img_score.score(image, prompt, cp=str(folder / "HPS_v2_compressed.pt"))[0])


def imagereward(folder: Path) -> Score:
    """ImageReward.load(...).score(prompt, image)"""
    import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    if (folder / "vision_config.json").exists():
        vision = json.loads((folder / "vision_config.json").read_text())
        width = vision["hidden_size"]
        tower = VisionTransformer(
            img_size=vision["image_size"], patch_size=vision["patch_size"], embed_dim=width,
            depth=vision["num_hidden_layers"], num_heads=vision["num_attention_heads"],
        )  # fmt: skip
        blip_pretrain.create_vit = lambda *arguments: (tower, width)
    module = sys.modules["ImageReward.ImageReward"]  # the attribute of that name is the class
    head = module.MLP
    hidden = json.loads((folder / "med_config.json").read_text())["hidden_size"]
    module.MLP = lambda size: head(hidden)
    before = os.getcwd()
    os.chdir(folder)  # `from_pretrained("bert-base-uncased")` prefers a folder of that name
    model = ImageReward.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
    os.chdir(before)
    return lambda image, prompt: model.score(prompt, image)


def aesthetic(folder: Path) -> Score:
    """image-reward's AestheticScore on OpenAI's `clip` package."""
    import clip
    from clip.model import build_model
    from ImageReward.models.AestheticScore import AestheticScore
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    network = build_model(openai_layout(load_file(folder / "model.safetensors"), config))
    clip.load = lambda *arguments, **options: (network, clip.clip._transform(network.visual.input_resolution))
    model = AestheticScore(download_root=None, device="cpu")
    model.mlp.load_state_dict(torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", map_location="cpu"))
    model.eval()

    def score(image: Image.Image, prompt: str) -> float:
        file = io.BytesIO()  # it opens files only; PNG loses nothing
        image.save(file, format="PNG")
        return model.score(prompt, file)

    return score


@torch.no_grad()
def pickscore(folder: Path) -> Score:
    """The lines of PickScore's model card, on transformers 4.40."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def score(image: Image.Image, prompt: str) -> float:
        cut = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        image_embs = model.get_image_features(**processor(images=image, **cut))
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**processor(text=prompt, **cut))
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item()

    return score


def openai_layout(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """transformers' CLIPModel keys -> those of OpenAI's package."""
    made = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }  # fmt: skip
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for tower, mine in (("vision", "visual.transformer"), ("text", "transformer")):
        for layer in range(config[f"{tower}_config"]["num_hidden_layers"]):
            here, there = f"{mine}.resblocks.{layer}", f"{tower}_model.encoder.layers.{layer}"
            norms |= {f"{here}.{part}": f"{there}.{name}" for part, name in parts.items()}
            for kind in ("weight", "bias"):
                rows = [state[f"{there}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                made[f"{here}.attn.in_proj_{kind}"] = torch.cat(rows)
    return made | {f"{key}.{kind}": state[f"{name}.{kind}"] for key, name in norms.items() for kind in ("weight", "bias")}


def main(reward: str, folder: Path) -> None:
    """Serve one reward."""
    torch.set_num_threads(1)
    score = {"aesthetic": aesthetic, "pickscore": pickscore, "hpsv2": hpsv2, "imagereward": imagereward}[reward](folder)
    called = ", ".join(f"{package} {version(package)}" for package in PACKAGES[reward])
    answers = server(
        lambda pixels, width, height, prompt: score(Image.frombytes("RGB", (width, height), pixels), prompt),
        f"/{reward}", called, needs_prompt=reward != "aesthetic",
    )  # fmt: skip
    print(f"http://127.0.0.1:{answers.server_port}/{reward}", flush=True)
    answers.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
