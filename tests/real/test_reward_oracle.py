"""Scores of rebuilt synthetic checkpoints against what the upstream packages gave on the same weights.

The oracle lies outside the repository: $TDPO_SHARED/rewards/oracle, else ../shared/rewards/oracle. `pytest -s` prints
the table of errors. The full-size architectures run with `-m slow` where the oracle has their scores.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdpo_cli import rewards
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.critic_encoder import critic_encoder
from tdpo_cli.rewards.preprocess import letterbox, normalise, resize_crop

SHARED = Path(os.environ.get("TDPO_SHARED") or Path(__file__).parents[2].parent / "shared")
ORACLE = SHARED / "rewards" / "oracle"
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no oracle at {ORACLE}; set TDPO_SHARED")

SCORERS = ("aesthetic", "pickscore", "hpsv2", "imagereward")
# (scorer, variant) -> (key of the upstream scores, largest error allowed)
UPSTREAM = {
    ("aesthetic", "tdpo"): ("aesthetic/tdpo/recipe", 1e-5),
    ("aesthetic", "package"): ("aesthetic/api_imagereward_pkg/recipe", 1e-5),
    ("pickscore", "tdpo"): ("pickscore/tdpo/scores", 1e-5),
    ("pickscore", "package"): ("pickscore/api/scores", 1e-4),  # 100 times the cosine
    ("hpsv2", "tdpo"): ("hpsv2/tdpo/scores", 1e-5),
    ("hpsv2", "package"): ("hpsv2/api/scores", 1e-5),
    ("imagereward", "tdpo"): ("imagereward/tdpo/scores", 1e-5),
    ("imagereward", "package"): ("imagereward/api/scores", 1e-5),
}
SIZES = ("reduced", pytest.param("full", marks=pytest.mark.slow))


# --- checkpoints in their published layouts ---------------------------------------------------------------------------
def spec_tensor(key: str, spec: list) -> torch.Tensor:
    """One tensor of a spec: kind i counts, kind c is a constant, the rest is Gaussian, seeded by the key's CRC-32."""
    shape, kind, a, b = spec
    if kind == "i":
        values = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    elif kind == "c":
        values = np.full(shape, a, dtype=np.float32)
    else:
        draws = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
        values = np.asarray(a + b * draws).astype(np.float16).astype(np.float32)
    return torch.from_numpy(values)


def state_and_config(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The state dict and configuration of spec_NAME.json, its checksum verified."""
    spec = json.loads((ORACLE / f"spec_{name}.json").read_text())
    state = {key: spec_tensor(key, entry) for key, entry in spec["tensors"].items()}
    checksum = 0
    for key in sorted(spec.get("checksum_keys", state)):
        checksum = zlib.crc32(state[key].numpy().tobytes(), zlib.crc32(key.encode(), checksum))
    assert checksum == spec["checksum"], f"spec_{name}.json: the weights came out differently"
    return state, spec["config"]


def write_checkpoint(scorer: str, size: str, folder: Path) -> Path:
    """Write the synthetic checkpoint of a scorer, `reduced` or `full`, as its authors publish it. -> the folder"""
    folder.mkdir(parents=True, exist_ok=True)
    globals()[f"_write_{scorer}"](size, folder)
    return folder


def _write_clip(name: str, folder: Path) -> None:
    from safetensors.torch import save_file

    state, config = state_and_config(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"], **config}))
    side = config["vision_config"]["image_size"]
    old_style = {"crop_size": side, "size": side, "resample": 3, "do_resize": True, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(old_style))


def _write_aesthetic(size: str, folder: Path) -> None:
    _write_clip(f"aesthetic_clip_{size}", folder)
    head, _ = state_and_config("aesthetic_head_full")
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")


def _write_pickscore(size: str, folder: Path) -> None:
    _write_clip(f"pickscore_{size}", folder)
    write_clip_tokenizer(folder)


def _write_hpsv2(size: str, folder: Path) -> None:
    state, config = state_and_config(f"hpsv2_{size}")
    torch.save({"state_dict": {key: value.half() for key, value in state.items()}}, folder / "HPS_v2_compressed.pt")
    if size != "full":
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def _write_imagereward(size: str, folder: Path) -> None:
    state, config = state_and_config(f"imagereward_{size}")
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(config["med"]))
    shutil.copy(ORACLE / "bert_vocab.txt", folder / "vocab.txt")
    if size != "full":
        vision = config["vision"]
        fields = {
            "hidden_size": vision["embed_dim"],
            "num_hidden_layers": vision["depth"],
            "patch_size": vision["patch_size"],
        }
        fields |= {"image_size": vision["img_size"], "num_attention_heads": vision["num_heads"]}
        fields |= {"intermediate_size": 4 * vision["embed_dim"]}
        (folder / "vision_config.json").write_text(json.dumps(fields))


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP's tokenizer, from the merges that open_clip ships."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    merges = gzip.open(default_bpe()).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


# --- inputs and upstream values ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inputs() -> tuple[list[torch.Tensor], list[str]]:
    """The images [3,H,W] in [0,1] and the prompts, in index order."""
    torch.set_num_threads(1)
    listing = json.loads((ORACLE / "inputs.json").read_text())
    images = [np.array(Image.open(ORACLE / "images" / f"{name}.png").convert("RGB")) for name in listing["images"]]
    for pixels, (name, entry) in zip(images, listing["images"].items(), strict=False):
        assert zlib.crc32(pixels.tobytes()) == entry["crc32"], name
    return [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in images], list(listing["prompts"].values())


@pytest.fixture(scope="module")
def image_names() -> list[str]:
    return list(json.loads((ORACLE / "inputs.json").read_text())["images"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(scorer, size) -> its checkpoint folder, written once."""
    root, written = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(scorer: str, size: str) -> Path:
        if (scorer, size) not in written:
            written[scorer, size] = write_checkpoint(scorer, size, root / f"{scorer}_{size}")
        return written[scorer, size]

    return folder


@pytest.fixture(scope="module")
def table():
    """Rows of the printed table of errors."""
    rows: list[tuple[str, str, float]] = []
    yield rows
    print(f"\n{'quantity':58s} {'size':8s} max error")
    for quantity, size, error in rows:
        print(f"{quantity:58s} {size:8s} {error:.1e}")


def upstream(size: str) -> dict[str, np.ndarray]:
    path = ORACLE / f"out_{size}.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    return dict(np.load(path))


def score_pairs(reward, inputs, pairs: np.ndarray) -> np.ndarray:
    """The reward of every (image, prompt) pair; images differ in size, so each image is a call with its prompts."""
    images, prompts = inputs
    scores = np.empty(len(pairs))
    for index in np.unique(pairs[:, 0]):
        rows = np.flatnonzero(pairs[:, 0] == index)
        texts = [prompts[p] for p in pairs[rows, 1]]
        scores[rows] = reward.score(images[index].expand(len(rows), -1, -1, -1), texts).numpy()
    return scores


# --- facts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scorer,variant", UPSTREAM)
def test_scores_equal_upstream(scorer, variant, size, inputs, folders, table):
    expected = upstream(size)
    reward = rewards.load(scorer, Backbones(), checkpoint=str(folders(scorer, size)), variant=variant)
    key, tolerance = UPSTREAM[scorer, variant]
    pairs = expected["pairs"]
    if scorer == "aesthetic":  # one score per image, whatever the prompt
        distinct = np.unique(pairs[:, 0])
        pairs = np.stack([distinct, np.zeros_like(distinct)], axis=1)
    error = np.abs(score_pairs(reward, inputs, pairs) - expected[key]).max()
    table.append((f"{scorer} ({variant}): score", size, error))
    assert error < tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scorer", ["aesthetic", "pickscore", "hpsv2"])
def test_embeddings_equal_upstream(scorer, size, inputs, folders, table):
    expected = upstream(size)
    clip = rewards.load(scorer, Backbones(), checkpoint=str(folders(scorer, size))).clip
    images, prompts = inputs
    seen_images, seen_prompts = (np.unique(expected["pairs"][:, column]) for column in (0, 1))
    found = {"image": torch.cat([clip.image_features(images[i][None]) for i in seen_images]).numpy()}
    if scorer != "aesthetic":
        found["text"] = clip.text_features([prompts[p] for p in seen_prompts]).numpy()
    for kind, embeddings in found.items():
        reference = expected[f"{scorer}/tdpo/{kind}_embed_raw"]
        error = np.abs(embeddings - reference).max() / np.abs(reference).max()
        table.append((f"{scorer}: {kind} embedding, relative", size, error))
        assert error < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_imagereward_features_equal_upstream(size, inputs, folders, table):
    expected = upstream(size)
    blip = rewards.load("imagereward", Backbones(), checkpoint=str(folders("imagereward", size))).blip
    images, prompts = inputs
    tokens = {i: blip.image_tokens(images[i][None]) for i in np.unique(expected["pairs"][:, 0])}
    states = torch.cat([blip.text_features([prompts[p]], tokens[i]) for i, p in expected["pairs"]]).numpy()
    summary = torch.cat([torch.cat([t[:, 0], t.mean(dim=1)], dim=1) for t in tokens.values()]).numpy()
    for quantity, found in (("txt_features", states), ("image_cls_and_mean", summary)):
        reference = expected[f"imagereward/tdpo/{quantity}"]
        error = np.abs(found - reference).max() / np.abs(reference).max()
        table.append((f"imagereward: {quantity}, relative", size, error))
        assert error < 1e-5


@pytest.mark.parametrize("scorer", ["pickscore", "hpsv2", "imagereward"])
def test_one_batch_of_all_prompts_equals_upstream(scorer, inputs, folders, table):
    images, prompts = inputs
    reward = rewards.load(scorer, Backbones(), checkpoint=str(folders(scorer, "reduced")))
    scores = reward.score(images[1].expand(len(prompts), -1, -1, -1), prompts).numpy()
    error = np.abs(scores - upstream("reduced")[f"{scorer}/tdpo/batch_rings224_all_prompts"]).max()
    table.append((f"{scorer} (tdpo): six prompts in a batch", "reduced", error))
    assert error < 1e-5


def test_pixels_equal_upstream_to_the_last_grey_level(inputs, image_names, table):
    expected = np.load(ORACLE / "pixels.npz")
    for image, name in zip(inputs[0], image_names, strict=False):
        found = resize_crop(image[None], 224)[0].permute(1, 2, 0).numpy()
        levels = np.abs(found - expected[f"tdpo_{name}"]).max()
        table.append((f"pixels of {name}, grey levels", "224", levels))
        assert levels == 0
    odd = image_names.index("odd149x199")
    found = resize_crop(inputs[0][odd][None], 224, "round")[0].permute(1, 2, 0).numpy()
    assert (found == expected["torchvision_odd149x199"]).all()


def test_letterbox_equals_the_hpsv2_package(inputs, image_names, table):
    expected = np.load(ORACLE / "pixels.npz")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    errors = []
    for image, name in zip(inputs[0], image_names, strict=False):
        found = normalise(letterbox(image[None], 224), mean, std)[0].numpy()
        errors.append(np.abs(found[:, 3::9, 3::9] - expected[f"hpsv2api_sub_{name}"]).max())
        statistics = [found.mean(), found.std(), found.min(), found.max()]
        assert np.abs(statistics - expected[f"hpsv2api_stats_{name}"]).max() < 1e-5
    table.append(("letterbox pixels, after mean and std", "224", max(errors)))
    assert max(errors) < 2e-6


def test_tokens_equal_upstream(inputs, folders):
    expected = json.loads((ORACLE / "tokens.json").read_text())
    backbones = Backbones()
    pickscore, hpsv2, imagereward = (
        rewards.load(scorer, backbones, checkpoint=str(folders(scorer, "reduced"))) for scorer in ("pickscore", "hpsv2", "imagereward")
    )
    prompts = inputs[1]
    assert pickscore.clip.tokens(prompts)["input_ids"].tolist() == expected["hf_clip_batch"]
    assert hpsv2.clip.tokens(prompts).tolist() == expected["hpsv2_open_clip_77"]
    ids, mask = imagereward.blip.tokens(prompts)
    assert ids.tolist() == expected["bert_35"]
    assert mask.tolist() == expected["bert_35_mask"]


@pytest.mark.parametrize("scorer", ["aesthetic", "pickscore", pytest.param("hpsv2", marks=pytest.mark.slow)])
def test_critic_sees_upstream_embeddings_normalised(scorer, inputs, folders):
    encoder = critic_encoder(scorer, Backbones(), {scorer: str(folders(scorer, "reduced"))})
    raw = upstream("reduced")[f"{scorer}/tdpo/image_embed_raw"]
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    found = torch.cat([encoder(image[None]) for image in inputs[0]]).numpy()
    assert found.shape == (len(inputs[0]), encoder.embed_dim)
    assert np.abs(found - expected).max() < 1e-5
