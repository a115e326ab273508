"""Train a small BLIP with a scoring head, and write it under the key names of the published ImageReward.pt."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from tdpo_cli.sandbox.training.aesthetic import Head
from tdpo_cli.sandbox.training.clip import captioned, contrastive_loss, pixels
from tdpo_cli.sandbox.training.common import cosine_schedule, steps
from tdpo_cli.sandbox.training.preferences import Scorer, judge, make_pairs, preference_loss
from tdpo_cli.sandbox.world import CANVAS, vocabulary

CAPTION_STEPS = 600
CAPTION_BATCH = 128
CAPTION_LEARNING_RATE = 1.5e-3
PAIRS = 3_600
AGREEMENT = 0.85
WRONG = 0.25
EPOCHS = 8
BATCH = 48
LEARNING_RATE = 6e-4
MATCHING = 0.3  # weight of "does the prompt belong to the picture", BLIP's own task, beside the preferences
CONTEXT = 35  # tokens, as upstream
VISION = {
    "image_size": CANVAS,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROJECTION = 64  # width in which BLIP compares picture and text; unused for scoring
CHECKPOINT_FILE = "ImageReward.pt"


class Blip(nn.Module):
    """The parts of ImageReward."""

    def __init__(self, vision: dict, med: dict):
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(text_config(med), add_pooling_layer=False)
        self.vision_proj = nn.Linear(vision["hidden_size"], PROJECTION)
        self.text_proj = nn.Linear(med["hidden_size"], PROJECTION)
        self.head = Head(med["hidden_size"])
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # of training only

    def look(self, images: Tensor) -> Tensor:
        """All tokens after the last norm, [b, 65, 64]; not `pooler_output`, which is normed twice."""
        return self.vision(pixel_values=pixels(images)).last_hidden_state

    def forward(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Image tokens and text -> raw score [b]."""
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return self.head(hidden[:, 0])

    def compare(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scaled cosines of every picture with every text, the text read alone, [b, b]."""
        text = self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        cosine = F.normalize(self.vision_proj(seen[:, 0]), dim=-1) @ F.normalize(self.text_proj(text), dim=-1).T
        return self.logit_scale.exp() * cosine


def text_config(med: dict) -> BlipTextConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "layer_norm_eps", "vocab_size")
    return BlipTextConfig(
        **{name: med[name] for name in names},
        num_attention_heads=med["num_attention_heads"],
        max_position_embeddings=med["max_position_embeddings"],
        encoder_hidden_size=med["encoder_width"],
        pad_token_id=med["pad_token_id"],
        bos_token_id=None,  # the defaults belong to the published vocabulary
        eos_token_id=None,
        sep_token_id=None,
        is_decoder=True,  # creates the cross-attention; the forward pass stays bidirectional
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def med_config(vocabulary_lines: int) -> dict:
    """Fields as in the published med_config.json."""
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": vocabulary_lines + 2,  # upstream appends [DEC] and [ENC], which no input holds
        "encoder_width": VISION["hidden_size"],
        "add_cross_attention": True,
    }


def build_imagereward(zoo: Path, seed: int) -> dict:
    torch.manual_seed(seed + 40)
    generator = torch.Generator().manual_seed(seed + 40)
    folder = zoo / "imagereward"
    med = write_configs(folder)
    tokenizer = load_tokenizer(folder)
    blip = Blip(VISION, med)
    learn_captions(blip, tokenizer, generator)
    learn_preferences(blip, tokenizer, zoo, seed, generator)
    torch.save(upstream_state(blip), folder / CHECKPOINT_FILE)
    return judge(load_scorer(zoo), make_pairs(zoo, seed + 42, 400, AGREEMENT, WRONG))


def learn_captions(blip: Blip, tokenizer: BertTokenizer, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(blip.parameters(), lr=CAPTION_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = cosine_schedule(optimizer, CAPTION_STEPS)
    for _ in steps("ir words", CAPTION_STEPS):
        images, texts = captioned(generator, CAPTION_BATCH)
        loss = contrastive_loss(blip.compare(blip.look(images), *encode(tokenizer, texts)))
        _step(loss, blip, optimizer, schedule)


def learn_preferences(blip: Blip, tokenizer: BertTokenizer, zoo: Path, seed: int, generator: torch.Generator) -> None:
    pairs = make_pairs(zoo, seed + 41, PAIRS, AGREEMENT, WRONG)
    ids, mask = encode(tokenizer, pairs.prompts)
    total = EPOCHS * (PAIRS // BATCH)
    optimizer = torch.optim.AdamW(blip.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = cosine_schedule(optimizer, total)
    for step in steps("imagereward", total):
        if step % (PAIRS // BATCH) == 0:
            order = torch.randperm(PAIRS, generator=generator).split(BATCH)
        rows = order[step % (PAIRS // BATCH)]
        label = pairs.label[rows]
        first, second = blip.look(torch.cat([pairs.first[rows], pairs.second[rows]])).chunk(2)
        better = torch.where(label.bool().view(-1, 1, 1), first, second)
        score_first, score_second = blip(first, ids[rows], mask[rows]), blip(second, ids[rows], mask[rows])
        score_better = torch.where(label.bool(), score_first, score_second)
        stray = rows[torch.randperm(len(rows), generator=generator)]
        score_stray = blip(better, ids[stray], mask[stray])
        other = (ids[stray] != ids[rows]).any(dim=1).float()  # two of the batch may share a prompt
        matching = -(other * F.logsigmoid(score_better - score_stray)).mean()
        _step(preference_loss(score_first, score_second, label) + MATCHING * matching, blip, optimizer, schedule)


def _step(loss: Tensor, blip: Blip, optimizer: torch.optim.Optimizer, schedule) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(blip.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def write_configs(folder: Path) -> dict:
    """Both configurations and vocab.txt: special tokens, letters to begin and to continue with, the world's words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [word for word in vocabulary() if len(word) > 1]
    lines = [*SPECIAL, *".,-!?'", *letters, *("##" + letter for letter in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    med = med_config(len(lines))
    (folder / "med_config.json").write_text(json.dumps(med, indent=2) + "\n")
    (folder / "vision_config.json").write_text(json.dumps(VISION, indent=2) + "\n")
    return med


def load_tokenizer(folder: Path) -> BertTokenizer:
    return BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)


def encode(tokenizer: BertTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [b, t]: padded to the longest here, which scores the same as padding to 35."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


# Key names

VISION_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("post_layernorm", "norm"),
)


def upstream_name(name: str) -> str:
    """Of a vision tensor: transformers' name -> ImageReward.pt's."""
    for here, there in VISION_NAMES:
        name = name.replace(here, there)
    return "blip.visual_encoder." + name


def upstream_state(blip: Blip) -> dict[str, Tensor]:
    state = {upstream_name(name): value for name, value in blip.vision.state_dict().items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in blip.text.state_dict().items()}
    positions = blip.text.config.max_position_embeddings
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    for part in ("vision_proj", "text_proj"):
        state |= {f"blip.{part}.{name}": value for name, value in getattr(blip, part).state_dict().items()}
    state |= {f"mlp.{name}": value for name, value in blip.head.state_dict().items()}
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def load_scorer(zoo: Path) -> Scorer:
    """The raw output of the head."""
    folder = zoo / "imagereward"
    med, vision = (json.loads((folder / name).read_text()) for name in ("med_config.json", "vision_config.json"))
    tokenizer = load_tokenizer(folder)
    state = {k: v.float() for k, v in torch.load(folder / CHECKPOINT_FILE, weights_only=True).items()}
    blip = Blip(vision, med).eval()
    blip.vision.load_state_dict({name: state[upstream_name(name)] for name in blip.vision.state_dict()})
    blip.text.load_state_dict({name: state[f"blip.text_encoder.{name}"] for name in blip.text.state_dict()})
    blip.head.load_state_dict({name: state[f"mlp.{name}"] for name in blip.head.state_dict()})

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return blip(blip.look(images), *encode(tokenizer, prompts))

    return score
