"""ImageReward: how well an image fits its prompt and how people like it, by a BLIP image-grounded text encoder (Xu et al. 2023).

Source: the `image-reward` package (`ImageReward.py`, `models/BLIP`), here on transformers' BLIP classes. Several
defaults of these have the right shapes and give wrong scores, hence the explicit configuration below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_cli.errors import RewardError
from tdpo_cli.rewards import files
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.networks import FrozenImageEncoder, ScoreHead
from tdpo_cli.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, CropOffset, Square

HUB = "THUDM/ImageReward"
VOCABULARY_HUB = "google-bert/bert-base-uncased"
WEIGHTS, TEXT_CONFIG, VISION_CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vision_config.json", "vocab.txt"

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the package's own data
MAX_TOKENS = 35


class ImageReward:
    name = "imagereward"
    needs_prompt = True

    def __init__(self, blip: BlipBackbone, head: ScoreHead, checkpoint: str, variant: str):
        self.blip = blip
        self.head = head
        self.checkpoint = checkpoint
        self.variant = variant
        self.crop_offset = "floor" if variant == "tdpo" else "round"  # transformers' and torchvision's central crop

    @property
    def square(self) -> Square:
        """What `score` sees of an image; the square alone gets the same score."""
        return self.blip.image_size, self.crop_offset

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [b,3,H,W] in [0,1], one prompt each -> [b] float32: the head's output, standardised in the package."""
        if len(prompts) != len(images):
            raise RewardError(f"{len(images)} images but {len(prompts)} prompts")
        scores = self.head(self.blip.text_features(prompts, self.blip.image_tokens(images, self.crop_offset)))
        if self.variant == "package":
            scores = (scores - MEAN) / STD
        return scores.to(images.device)

    def describe(self) -> dict[str, Any]:
        scales = {"tdpo": "the head's raw output", "package": f"(the head's output - {MEAN}) / {STD}"}
        return {
            "checkpoint": self.checkpoint,
            "sha256": files.fingerprints(*self.blip.paths),
            "variant": self.variant,
            "preprocessing": self.blip.preprocessing(self.crop_offset),
            "scale": scales[self.variant],
        }


class BlipBackbone(FrozenImageEncoder):
    """BLIP's ViT, and a BERT whose layers also attend to the image."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        weights: Path,
        text_config: Path,
        vision_config: Path | None,
        vocabulary: Path,
    ):
        """`state` is what `weights` holds. Its shapes give the sizes, the two configs what shapes cannot tell."""
        from tokenizers import BertWordPieceTokenizer
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.paths = tuple(path for path in (weights, text_config, vision_config, vocabulary) if path)
        image_state, text_state = image_tower(state), text_tower(state)
        try:
            with files.building():
                image_settings = image_config(image_state, files.read_json(vision_config) if vision_config else {})
                text_settings = text_encoder_config(text_state, files.read_json(text_config), image_settings.hidden_size)
                self.vision = BlipVisionModel(image_settings)
                self.text = BlipTextModel(text_settings, add_pooling_layer=False)
        except KeyError as error:
            raise RewardError(f"{weights} does not fit ImageReward: it has nothing like {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise RewardError(f"{vision_config or text_config} does not describe ImageReward's BLIP: {error}") from error
        files.fill(self.vision, image_state, weights)
        files.fill(self.text, text_state, weights)
        self.image_size, self.mean, self.std = image_settings.image_size, OPENAI_MEAN, OPENAI_STD
        self.embed_dim = text_settings.hidden_size
        self.tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding(length=MAX_TOKENS, pad_id=text_settings.pad_token_id)

    @torch.no_grad()
    def image_tokens(self, images: Tensor, crop_offset: CropOffset = "floor") -> Tensor:
        """images [b,3,H,W] in [0,1] -> [b,tokens,width] float32: class token and patches, after the last norm."""
        with torch.autocast(self.device.type, enabled=False):
            # last_hidden_state: pooler_output would be normed twice
            return self.vision(pixel_values=self.pixels(images, crop_offset)).last_hidden_state.float()

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both [b,35] int64."""
        encoded = self.tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([one.ids for one in encoded], device=self.device)
        return ids, torch.tensor([one.attention_mask for one in encoded], device=self.device)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], image_tokens: Tensor) -> Tensor:
        """One prompt per image's tokens -> [b,hidden] float32: the state of [CLS] after the last layer."""
        ids, mask = self.tokens(prompts)
        with torch.autocast(self.device.type, enabled=False):
            # is_decoder stays at its default False here: True would hide the words to the right
            states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image_tokens.to(self.dtype))
        return states.last_hidden_state[:, 0].float()


def image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of BLIP's ViT (timm's) -> those of BlipVisionModel. The tensors stay as they are, even the fused qkv."""
    renames = (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
    )
    tower = {}
    for key, value in _under(state, "blip.visual_encoder.").items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        tower[key] = value
    return tower


def text_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of BlipTextModel: those of the file, less a buffer that is no longer stored."""
    tower = _under(state, "blip.text_encoder.")
    tower.pop("embeddings.position_ids", None)
    return tower


def image_config(tower: Mapping[str, Tensor], given: Mapping[str, Any]) -> Any:
    """BlipVisionConfig from the tower's shapes, with the fields of vision_config.json where there is one."""
    from transformers import BlipVisionConfig

    width, _, patch_size, _ = tower["embeddings.patch_embedding.weight"].shape
    patches = tower["embeddings.position_embedding"].shape[1] - 1
    fields = {
        "hidden_size": width,
        "intermediate_size": tower["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(tower, "encoder.layers."),
        "num_attention_heads": width // 64,  # as every ViT of BLIP; shapes do not tell
        "image_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # the class's default is 1e-5
    }
    return BlipVisionConfig(**{**fields, **given})


def text_encoder_config(tower: Mapping[str, Tensor], given: Mapping[str, Any], image_width: int) -> Any:
    """BlipTextConfig from the tower's shapes and med_config.json, whose encoder_width the package overrides too."""
    from transformers import BlipTextConfig

    rows, hidden = tower["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=rows,
        hidden_size=hidden,
        encoder_hidden_size=image_width,
        intermediate_size=tower["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(tower, "encoder.layer."),
        num_attention_heads=given.get("num_attention_heads", 12),  # the class's default is 8
        max_position_embeddings=tower["embeddings.position_embeddings.weight"].shape[0],
        hidden_act=given.get("hidden_act", "gelu"),
        layer_norm_eps=given.get("layer_norm_eps", 1e-12),
        pad_token_id=given.get("pad_token_id", 0),
        is_decoder=True,  # this is what creates the cross-attention
    )


def imagereward(backbones: Backbones, checkpoint: str | None, variant: str) -> ImageReward:
    """`checkpoint`: a folder with ImageReward.pt, med_config.json, BERT's vocab.txt and, for another image tower than
    ViT-L/16, vision_config.json; or a hub id with the first two."""
    source = checkpoint or HUB
    weights = files.find(source, WEIGHTS, needed_by="imagereward", fetch=f"{HUB} {WEIGHTS}")
    text_config = files.find(source, TEXT_CONFIG, needed_by="imagereward", fetch=f"{HUB} {TEXT_CONFIG}")
    words = source if files.is_local(source) else VOCABULARY_HUB
    vocabulary = files.find(words, VOCABULARY, needed_by="imagereward", fetch=f"{VOCABULARY_HUB} {VOCABULARY}")
    vision_config = files.find_optional(source, VISION_CONFIG)

    def read() -> dict[str, Tensor]:
        return files.read_weights(weights)

    key = weights.resolve()
    blip = backbones.hold(("imagereward", key), lambda: BlipBackbone(read(), weights, text_config, vision_config, vocabulary))
    head = backbones.hold(("imagereward head", key), lambda: ScoreHead(_under(read(), "mlp."), weights, blip.embed_dim))
    return ImageReward(blip, head, source, variant)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _layers(tower: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers follow the prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in tower if key.startswith(prefix)})
