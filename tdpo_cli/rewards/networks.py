"""The frozen networks themselves: image encoders behind their preprocessing, text towers, score heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_cli.errors import RewardError
from tdpo_cli.rewards import files
from tdpo_cli.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Framing, frame, normalise

CLIP_HUB = "openai/clip-vit-large-patch14"
MOST_LAYERS = 1000  # of a tower; the largest published one has 64
_CLIP_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Frozen(nn.Module):
    """A network that is never trained. Its sources are named for the record."""

    paths: tuple[Path, ...] = ()  # the files it was read from

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def move(self, device: torch.device) -> None:
        self.to(device)


class FrozenImageEncoder(Frozen):
    """An image tower behind its preprocessing."""

    embed_dim: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [b,3,H,W] float in [0,1] -> [b,embed_dim] float32, L2-normalised, on the images' device."""
        return nn.functional.normalize(self.image_features(images), dim=-1).to(images.device)

    @torch.no_grad()
    def image_features(self, images: Tensor, framing: Framing = "floor") -> Tensor:
        """images [b,3,H,W] float in [0,1] -> [b,embed_dim] float32, not normalised, on the network's device."""
        with torch.autocast(self.device.type, enabled=False):
            return self._encode(self.pixels(images, framing)).float()

    def pixels(self, images: Tensor, framing: Framing = "floor") -> Tensor:
        """The network's input, [b,3,image_size,image_size] in the network's precision."""
        levels = frame(images.to(self.device), self.image_size, framing)
        return normalise(levels, self.mean, self.std).to(self.dtype)

    def preprocessing(self, framing: Framing = "floor") -> dict[str, Any]:
        """The same in words, for the record of a score."""
        how = {
            "floor": "shortest side, central crop at (n - size) // 2",
            "round": "shortest side, central crop at round((n - size) / 2)",
            "letterbox": "longest side, zero padding",
        }
        kernel = "bicubic, antialiased, " + ("float" if framing == "letterbox" else "8-bit as in Pillow 10.4")
        return {
            "size": self.image_size,
            "resize": how[framing],
            "kernel": kernel,
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class ClipBackbone(FrozenImageEncoder):
    """A transformers CLIPModel with its tokenizer: image and text features in one space."""

    def __init__(self, source: str | Path, needed_by: str, hub_id: str, tokenizer_hub: str):
        """See `Backbones.clip`."""
        super().__init__()
        self.source, self.paths = str(source), clip_files(source, needed_by, hub_id)
        config, weights = self.paths[:2]
        self.model = _load_clip(config.parent, weights)
        self.embed_dim = self.model.config.projection_dim
        self.image_size = self.model.config.vision_config.image_size
        self.mean, self.std = _preprocessing(source, self.image_size)
        self._needed_by, self._tokenizer_hub = needed_by, tokenizer_hub
        self._tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        return self.model.visual_projection.weight.device

    def move(self, device: torch.device) -> None:
        """To `device`; the text tower follows only where it is used (the aesthetic reward and the critic never do)."""
        self.model.vision_model.to(device)
        self.model.visual_projection.to(device)
        if self._tokenizer is not None:
            self.model.to(device)

    @property
    def logit_scale(self) -> float:
        """The temperature's inverse, exp of the stored logarithm; about 100."""
        return math.exp(self.model.logit_scale.item())

    def load_tokenizer(self) -> None:
        """Make ready for texts."""
        if self._tokenizer is None:
            self._tokenizer = _clip_tokenizer(self.source, self._needed_by, self._tokenizer_hub)
            self.move(self.device)

    def tokens(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """input_ids and attention_mask [b,L], L the longest prompt's, at most the network's."""
        self.load_tokenizer()
        length = self.model.config.text_config.max_position_embeddings
        arguments = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        return self._tokenizer(list(prompts), **arguments).to(self.device)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """prompts -> [b,embed_dim] float32, not normalised."""
        tokens = self.tokens(prompts)
        with torch.autocast(self.device.type, enabled=False):
            # the tower's own output: get_text_features gives a tensor or an object, depending on transformers' version
            pooled = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
            return self.model.text_projection(pooled).float()

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)


class OpenClipBackbone(FrozenImageEncoder):
    """An open_clip CLIP: ViT-H-14, or what an open_clip_config.json beside the weights says."""

    def __init__(self, weights: Path):
        import open_clip

        super().__init__()
        config_path = weights.parent / "open_clip_config.json"
        custom = config_path.is_file()
        config = files.read_json(config_path) if custom else {}
        # Not ViT-H-14-quickgelu: same shapes, other scores.
        model_config = config.get("model_cfg") if custom else open_clip.get_model_config("ViT-H-14")
        if custom:
            _check_open_clip(model_config, config_path)
        try:
            with files.building():
                self.model = open_clip.CLIP(**model_config)
        except (TypeError, KeyError, ValueError) as error:
            raise RewardError(f"{config_path} does not describe an open_clip CLIP (model_cfg): {error}") from error
        files.fill(self.model, files.read_weights(weights), weights)
        self.source, self.paths = str(weights), (config_path, weights) if custom else (weights,)
        self.embed_dim = model_config["embed_dim"]
        size = self.model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        preprocessing = config.get("preprocess_cfg", {})
        self.mean, self.std = preprocessing.get("mean", OPENAI_MEAN), preprocessing.get("std", OPENAI_STD)
        self._tokenizer = _open_clip_tokenizer(model_config["text_cfg"], config_path)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [b,L], L the network's context length."""
        return self._tokenizer(list(prompts)).to(self.device)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """prompts -> [b,embed_dim] float32, not normalised."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.encode_text(self.tokens(prompts)).float()

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class ScoreHead(Frozen):
    """The LAION head: five linear layers, with nothing but dropout between them, from an embedding to a number."""

    def __init__(self, state: Mapping[str, Tensor], path: Path, embed_dim: int):
        """`state` has the keys layers.{0,2,4,6,7}.{weight,bias}; all widths are read from its shapes."""
        super().__init__()
        layers: list[nn.Module] = [nn.Identity() for _ in range(8)]  # the gaps were dropout
        width = embed_dim
        for index in (0, 2, 4, 6, 7):
            weight = state.get(f"layers.{index}.weight")
            if weight is None or weight.ndim != 2 or weight.shape[1] != width:
                found = "missing" if weight is None else list(weight.shape)
                raise RewardError(f"{path}: layers.{index}.weight is {found}, expected [any, {width}]")
            width = weight.shape[0]
            layers[index] = nn.Linear(weight.shape[1], width)
        if width != 1:
            raise RewardError(f"{path}: layers.7.weight gives {width} numbers an image, expected 1")
        self.layers = nn.Sequential(*layers)
        self.paths = (path,)
        files.fill(self, state, path)

    @torch.no_grad()
    def forward(self, embeddings: Tensor) -> Tensor:
        """[b,embed_dim] -> [b], float32 whatever the backbone's precision."""
        with torch.autocast(self.device.type, enabled=False):
            return self.layers(embeddings.float()).squeeze(1)


def cosine(clip: ClipBackbone | OpenClipBackbone, images: Tensor, prompts: Sequence[str], framing: Framing = "floor") -> Tensor:
    """The cosine of each image and its prompt: [b,3,H,W] and b prompts -> [b] float32 on the network's device."""
    if len(prompts) != len(images):
        raise RewardError(f"{len(images)} images but {len(prompts)} prompts")
    distinct = list(dict.fromkeys(prompts))  # a batch often repeats a prompt, and the text tower is not small
    row = [distinct.index(prompt) for prompt in prompts]
    texts = nn.functional.normalize(clip.text_features(distinct), dim=-1)[row]
    return (nn.functional.normalize(clip.image_features(images, framing), dim=-1) * texts).sum(dim=-1)


# --- reading a CLIPModel ----------------------------------------------------------------------------------------------
def clip_files(source: str | Path, needed_by: str, hub_id: str) -> tuple[Path, ...]:
    """config.json, the weights and, where those are an index, its shards."""
    config = files.find(source, "config.json", needed_by=needed_by, fetch=hub_id)
    weights = files.find(source, *_CLIP_WEIGHTS, needed_by=needed_by, fetch=hub_id)
    shards = files.read_json(weights).get("weight_map", {}) if weights.name.endswith(".index.json") else {}
    names = sorted(set(shards.values()))
    return config, weights, *(files.find(source, name, needed_by=needed_by, fetch=hub_id) for name in names)


def _load_clip(folder: Path, weights: Path) -> nn.Module:
    from transformers import CLIPModel

    try:
        with files.quiet_transformers():
            model, info = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # transformers, safetensors, pickle and torch each raise their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RewardError(f"{weights} does not load as the CLIPModel of {folder}/config.json: {reason[0]}") from error
    # transformers would draw these at random and go on. Old files' position_ids are unexpected keys, and harmless.
    missing = sorted(info["missing_keys"])
    wrong = [f"{key} is {list(seen)}, expected {list(wanted)}" for key, seen, wanted in info["mismatched_keys"]]
    if missing or wrong:
        raise RewardError(f"{weights} does not fit {folder}/config.json: " + files.summary(missing, [], wrong))
    return model


def _clip_tokenizer(source: str, needed_by: str, tokenizer_hub: str) -> Any:
    """The tokenizer beside the weights; for a hub id without one, that of `tokenizer_hub`."""
    from transformers import CLIPTokenizerFast

    place = source
    if not files.is_local(source) and not files.find_optional(source, "tokenizer.json", "merges.txt"):
        place = tokenizer_hub
    found = files.find_optional(place, "tokenizer.json")
    if found is None:  # the older pair
        needs = {"needed_by": f"{needed_by} (its tokenizer)", "fetch": f"{tokenizer_hub} vocab.json merges.txt"}
        files.find(place, "merges.txt", **needs)
        found = files.find(place, "vocab.json", **needs)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        files.find_optional(place, name)
    with files.quiet_transformers():
        return CLIPTokenizerFast.from_pretrained(found.parent, local_files_only=True)


def _preprocessing(source: str | Path, image_size: int) -> tuple[Sequence[float], Sequence[float]]:
    """mean and std of preprocessor_config.json, whose size must be the network's; CLIP's own where there is none."""
    path = files.find_optional(source, "preprocessor_config.json")
    config = files.read_json(path) if path else {}
    for name in ("size", "crop_size"):
        entry = config.get(name, image_size)  # a number in old files, a dict in newer ones
        sizes = set(entry.values()) if isinstance(entry, dict) else {entry}
        if sizes != {image_size}:
            raise RewardError(f"{path}: {name} is {entry}, but the network of config.json sees {image_size} pixels")
    return config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)


def _check_open_clip(model_config: Any, path: Path) -> None:
    """RewardError for a model_cfg that would run Python of its folder, ask the hub for other files, or build without end."""
    towers = [model_config.get(name) if isinstance(model_config, dict) else None for name in ("vision_cfg", "text_cfg")]
    if not all(isinstance(tower, dict) for tower in towers):
        raise RewardError(f"{path} does not describe an open_clip CLIP: model_cfg needs a vision_cfg and a text_cfg")
    for tower in towers:
        for key, value in tower.items():
            if value is not None and (key == "bpe_path" or str(key).startswith(("hf_model", "hf_proj", "timm_"))):
                raise RewardError(f"{path}: {key} names files outside this checkpoint, so it is refused; only open_clip's own towers are read")
        if not isinstance(tower.get("layers", 1), (int, list)) or isinstance(tower.get("layers"), int) and tower["layers"] > MOST_LAYERS:
            raise RewardError(f"{path}: layers is {str(tower['layers'])[:40]}, expected at most {MOST_LAYERS}")
    if towers[1].get("hf_tokenizer_name") is not None:
        for config in (path.with_name("tokenizer_config.json"), path.with_name("config.json")):
            if config.is_file() and "auto_map" in files.read_json(config):
                raise RewardError(f"{config}: auto_map names Python code to run, so it is refused; give a tokenizer that transformers has itself")
        if not any(path.with_name(name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            raise RewardError(f"{path}: text_cfg.hf_tokenizer_name needs the tokenizer's files beside it; another place is not asked.")
    given = towers[1].get("tokenizer_kwargs", {})
    if not isinstance(given, dict) or not set(given) <= {"context_length", "clean", "reduction_mask"}:
        raise RewardError(f"{path}: text_cfg.tokenizer_kwargs is {str(given)[:80]}; expected clean, context_length or reduction_mask")


def _open_clip_tokenizer(text_config: Mapping[str, Any], config_path: Path) -> Callable[[list[str]], Tensor]:
    import open_clip

    if text_config.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(f"local-dir:{config_path.parent}")
    length = text_config.get("context_length", 77)
    tokenizer = open_clip.SimpleTokenizer(context_length=length, **text_config.get("tokenizer_kwargs", {}))
    rows = text_config.get("vocab_size", tokenizer.vocab_size)
    if rows < tokenizer.vocab_size:
        raise RewardError(
            f"{config_path}: text_cfg.vocab_size is {rows}, but CLIP's tokenizer knows {tokenizer.vocab_size} tokens; "
            "put tokenizer files beside it and name them with text_cfg.hf_tokenizer_name"
        )
    return tokenizer
