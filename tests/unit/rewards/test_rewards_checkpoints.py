"""Loading the four reward models from disk: what is shared, what is read from the files, and what is refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tdpo_cli import rewards
from tdpo_cli.errors import RewardError
from tdpo_cli.rewards import scoring
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.critic_encoder import critic_encoder

torch.set_num_threads(1)
SIDE = 32  # pixels the tiny networks see
EMBED = 24
IMAGES = torch.rand(3, 3, 40, 50, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a cat"]
HEAD_WIDTHS = {0: (16, EMBED), 2: (12, 16), 4: (8, 12), 6: (4, 8), 7: (1, 4)}


def write_clip(folder, seed=0, mean=(0.5, 0.5, 0.5)):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "patch_size": 8, "image_size": SIDE},
        text_config={
            **tower,
            "vocab_size": 514,
            "max_position_embeddings": 20,
            "bos_token_id": 512,
            "eos_token_id": 513,
        },
        projection_dim=EMBED,
    )
    CLIPModel(config).save_pretrained(folder)
    preprocessing = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessing, "image_mean": mean, "image_std": [0.2] * 3}))


def write_tokenizer(folder):
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def head_state(prefix="", width=EMBED):
    torch.manual_seed(1)
    shapes = {**HEAD_WIDTHS, 0: (16, width)}
    state = {f"{prefix}layers.{i}.weight": torch.randn(shape) / shape[1] ** 0.5 for i, shape in shapes.items()}
    return state | {f"{prefix}layers.{i}.bias": torch.zeros(shape[0]) for i, shape in shapes.items()}


@pytest.fixture
def aesthetic(tmp_path):
    folder = tmp_path / "aesthetic"
    write_clip(folder)
    torch.save(head_state(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


@pytest.fixture
def pickscore(tmp_path):
    folder = tmp_path / "pickscore"
    write_clip(folder, seed=2)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def hpsv2(tmp_path):
    import open_clip

    folder = tmp_path / "hpsv2"
    folder.mkdir()
    write_tokenizer(folder)
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))
    model = {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 514,
            "width": 16,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": ".",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    torch.manual_seed(3)
    network = open_clip.CLIP(EMBED, model["vision_cfg"], model["text_cfg"])
    torch.save({"state_dict": network.half().state_dict()}, folder / "HPS_v2_compressed.pt")
    return folder


@pytest.fixture
def imagereward(tmp_path):
    from transformers import BlipTextConfig, BlipTextModel

    folder = tmp_path / "imagereward"
    folder.mkdir()
    torch.manual_seed(4)
    vision = {"cls_token": (1, 1, 16), "pos_embed": (1, 17, 16), "patch_embed.proj.weight": (16, 3, 8, 8)}
    vision |= {"patch_embed.proj.bias": (16,), "norm.weight": (16,), "norm.bias": (16,)}
    for norm in ("norm1", "norm2"):
        vision |= {f"blocks.0.{norm}.weight": (16,), f"blocks.0.{norm}.bias": (16,)}
    for name, shape in {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}.items():
        vision |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    state = {f"blip.visual_encoder.{key}": torch.randn(shape) * 0.2 for key, shape in vision.items()}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    text = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=EMBED,
        encoder_hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        is_decoder=True,
        bos_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
    )
    tower = BlipTextModel(text, add_pooling_layer=False).state_dict()
    state |= {f"blip.text_encoder.{key}": value for key, value in tower.items()}
    torch.save(state | head_state("mlp."), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({"num_attention_heads": 2, "encoder_width": 768}))
    (folder / "vision_config.json").write_text(json.dumps({"num_attention_heads": 4}))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


ALL = ("aesthetic", "pickscore", "hpsv2", "imagereward")


@pytest.fixture
def folder_of(request):
    return lambda name: str(request.getfixturevalue(name))


# --- scores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("variant", rewards.VARIANTS)
def test_batch_scores_like_its_images_one_by_one(name, variant, folder_of):
    reward = rewards.load(name, Backbones(), checkpoint=folder_of(name), variant=variant)
    together = reward.score(IMAGES, PROMPTS)
    alone = torch.cat([reward.score(image[None], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=False)])
    assert together.shape == (3,) and together.dtype == torch.float32
    assert torch.allclose(together, alone, atol=1e-5 * max(1, alone.abs().max().item()))
    assert together.std() > 0


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_prompt_matters_and_its_absence_is_an_error(name, folder_of):
    reward = rewards.load(name, Backbones(), checkpoint=folder_of(name))
    same = IMAGES[:1].expand(2, -1, -1, -1)
    cat, dog = reward.score(same, ["a cat", "a dog"])
    assert cat != dog
    with pytest.raises(RewardError, match="2 images but 1 prompts"):
        reward.score(same, ["a cat"])


@pytest.mark.parametrize("name", ALL)
def test_description_names_every_file_with_its_hash(name, folder_of):
    import hashlib

    folder = folder_of(name)
    record = rewards.load(name, Backbones(), checkpoint=folder, variant="package").describe()
    assert record["checkpoint"] == folder and record["variant"] == "package" and record["preprocessing"]["size"] == SIDE
    assert len(record["sha256"]) >= 2
    for path, digest in record["sha256"].items():
        assert digest == hashlib.sha256(open(path, "rb").read()).hexdigest()
    json.dumps(record)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_an_option_with_a_small_difference(name, folder_of):
    arguments = {"checkpoint": folder_of(name)}
    difference = scoring.half_precision_difference(name, torch.bfloat16, IMAGES, PROMPTS, **arguments)
    assert 0 < difference["mean"] <= difference["max"] < 0.3


def test_checkpoint_stored_in_half_precision_is_computed_in_float32(aesthetic):
    weights = aesthetic / "model.safetensors"
    save_file({key: value.half() for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((aesthetic / "config.json").read_text())
    (aesthetic / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    assert rewards.load("aesthetic", Backbones(), checkpoint=str(aesthetic)).clip.dtype == torch.float32


def test_old_position_ids_are_ignored_silently(aesthetic, capfd):
    weights = aesthetic / "model.safetensors"
    extra = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(load_file(weights) | extra, weights, metadata={"format": "pt"})
    rewards.load("aesthetic", Backbones(), checkpoint=str(aesthetic))
    assert capfd.readouterr().err == ""


def test_mean_and_std_come_from_the_checkpoint(tmp_path):
    encoders = []
    for index, mean in enumerate(([0.5] * 3, [0.1] * 3)):
        write_clip(tmp_path / str(index), mean=mean)
        encoders.append(Backbones().clip(tmp_path / str(index)))
    assert not torch.allclose(encoders[0](IMAGES), encoders[1](IMAGES))


# --- sharing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["aesthetic", "pickscore", "hpsv2"])
def test_reward_and_critic_share_one_network(name, folder_of):
    backbones, folder = Backbones(), folder_of(name)
    reward = rewards.load(name, backbones, checkpoint=folder)
    encoder = critic_encoder(name, backbones, {name: folder})
    assert encoder is reward.clip
    embeddings = encoder(IMAGES)
    assert embeddings.shape == (3, encoder.embed_dim) and encoder.image_size == SIDE
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("name", ["imagereward", "gold", "jpeg-compressibility", "mine:f"])
def test_other_critics_see_through_the_aesthetic_clip(name, aesthetic):
    backbones = Backbones()
    reward = rewards.load("aesthetic", backbones, checkpoint=str(aesthetic))
    assert critic_encoder(name, backbones, {"aesthetic": str(aesthetic)}) is reward.clip


def test_one_checkpoint_under_two_names_is_one_network(aesthetic, tmp_path):
    (tmp_path / "link").symlink_to(aesthetic)
    backbones = Backbones()
    assert backbones.clip(aesthetic) is backbones.clip(str(tmp_path / "link"))


def test_different_weights_are_different_networks(aesthetic, pickscore):
    backbones = Backbones()
    assert backbones.clip(aesthetic) is not backbones.clip(pickscore)


def test_loading_a_reward_twice_keeps_one_copy(imagereward):
    backbones = Backbones()
    first, second = (rewards.load("imagereward", backbones, checkpoint=str(imagereward)) for _ in range(2))
    assert first.blip is second.blip and first.head is second.head


def test_parking_moves_every_network_away(aesthetic, monkeypatch):
    backbones = Backbones("meta")  # stands in for a GPU: only where the parameters are matters here
    moves = []
    monkeypatch.setattr("tdpo_cli.rewards.backbones.ClipBackbone.move", lambda self, device: moves.append(device.type))
    backbones.clip(aesthetic)
    backbones.park()
    assert moves == ["meta", "cpu"]


def test_scores_survive_parking(pickscore):
    backbones = Backbones()
    reward = rewards.load("pickscore", backbones, checkpoint=str(pickscore))
    before = reward.score(IMAGES, PROMPTS)
    backbones.park()
    with backbones.awake(reward):
        assert torch.equal(reward.score(IMAGES, PROMPTS), before)


def test_networks_loaded_in_inference_mode_can_be_moved_outside_it(aesthetic):
    backbones = Backbones()
    with torch.inference_mode():
        inside = rewards.load("aesthetic", backbones, checkpoint=str(aesthetic)).score(IMAGES, PROMPTS)
    backbones.park()
    assert torch.equal(rewards.load("aesthetic", backbones, checkpoint=str(aesthetic)).score(IMAGES, PROMPTS), inside)


def test_sharded_weights_load_and_each_shard_is_needed(aesthetic):
    expected = Backbones().clip(aesthetic)(IMAGES)
    state = load_file(aesthetic / "model.safetensors")
    shards = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(state)}
    for shard in set(shards.values()):
        save_file({k: v for k, v in state.items() if shards[k] == shard}, aesthetic / shard, metadata={"format": "pt"})
    (aesthetic / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (aesthetic / "model.safetensors").unlink()
    assert torch.equal(Backbones().clip(aesthetic)(IMAGES), expected)
    (aesthetic / "model-1.safetensors").unlink()
    refused("aesthetic", aesthetic, "needs model-1.safetensors")


def test_networks_are_frozen(aesthetic):
    clip = Backbones().clip(aesthetic)
    assert not clip.training and not any(parameter.requires_grad for parameter in clip.parameters())
    assert not clip(IMAGES.clone().requires_grad_()).requires_grad


# --- refusals ---------------------------------------------------------------------------------------------------------
def refused(name, folder, message):
    with pytest.raises(RewardError, match=message):
        rewards.load(name, Backbones(), checkpoint=str(folder))


@pytest.mark.parametrize(
    "name,missing,command",
    [
        ("aesthetic", "config.json", "hf download openai/clip-vit-large-patch14 --local-dir"),
        ("aesthetic", "model.safetensors", "hf download openai/clip-vit-large-patch14 --local-dir"),
        (
            "aesthetic",
            "sac+logos+ava1-l14-linearMSE.pth",
            "hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth",
        ),
        ("pickscore", "model.safetensors", "hf download yuvalkirstain/PickScore_v1 --local-dir"),
        ("pickscore", "vocab.json", "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("hpsv2", "HPS_v2_compressed.pt", "hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir"),
        ("imagereward", "ImageReward.pt", "hf download THUDM/ImageReward ImageReward.pt --local-dir"),
        ("imagereward", "med_config.json", "hf download THUDM/ImageReward med_config.json --local-dir"),
        ("imagereward", "vocab.txt", "hf download google-bert/bert-base-uncased vocab.txt --local-dir"),
    ],
)
def test_missing_file_is_named_with_the_command_that_fetches_it(name, missing, command, folder_of, tmp_path):
    folder = folder_of(name)
    (tmp_path / name / missing).unlink()
    with pytest.raises(RewardError) as caught:
        rewards.load(name, Backbones(), checkpoint=folder)
    assert missing in str(caught.value) and folder in str(caught.value) and command in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_missing_folder_is_an_error_that_says_so(name, tmp_path):
    refused(name, tmp_path / "nowhere", "there is no such folder")


def test_hub_offline_is_said_with_the_command(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError, match="HF_HUB_OFFLINE is set.*hf download yuvalkirstain/PickScore_v1"):
        rewards.load("pickscore", Backbones())


@pytest.mark.parametrize(
    "name,file",
    [
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
        ("hpsv2", "HPS_v2_compressed.pt"),
        ("imagereward", "ImageReward.pt"),
    ],
)
def test_pickle_that_is_not_plain_weights_is_refused_and_not_run(name, file, folder_of, tmp_path):
    folder, trap = folder_of(name), tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    (tmp_path / name / file).write_bytes(pickle.dumps({"layers.0.weight": Evil()}, protocol=2))
    refused(name, folder, "was refused: it does not load as plain weights")
    assert not trap.exists()


def test_clip_pickle_that_is_not_plain_weights_is_refused_and_not_run(aesthetic, tmp_path):
    trap = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    (aesthetic / "model.safetensors").unlink()
    torch.save({"logit_scale": Evil()}, aesthetic / "pytorch_model.bin")
    refused("aesthetic", aesthetic, "pytorch_model.bin does not load")
    assert not trap.exists()


def test_clip_pickle_of_plain_weights_loads(aesthetic):
    expected = Backbones().clip(aesthetic)(IMAGES)
    torch.save(load_file(aesthetic / "model.safetensors"), aesthetic / "pytorch_model.bin")
    (aesthetic / "model.safetensors").unlink()
    assert torch.equal(Backbones().clip(aesthetic)(IMAGES), expected)


def test_truncated_weights_are_refused(hpsv2):
    path = hpsv2 / "HPS_v2_compressed.pt"
    path.write_bytes(path.read_bytes()[:1000])
    refused("hpsv2", hpsv2, "HPS_v2_compressed.pt was refused")


def test_missing_key_of_a_clip_is_named(aesthetic):
    weights = aesthetic / "model.safetensors"
    state = load_file(weights)
    del state["visual_projection.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    refused("aesthetic", aesthetic, "1 missing keys .visual_projection.weight")


def test_wrong_shape_of_a_clip_is_named(pickscore):
    weights = pickscore / "model.safetensors"
    save_file(load_file(weights) | {"text_projection.weight": torch.zeros(5, 16)}, weights, metadata={"format": "pt"})
    refused("pickscore", pickscore, r"text_projection.weight is \[5, 16\], expected \[24, 16\]")


def test_head_of_another_width_is_named(aesthetic):
    torch.save(head_state(width=768), aesthetic / "sac+logos+ava1-l14-linearMSE.pth")
    refused("aesthetic", aesthetic, r"layers.0.weight is \[16, 768\], expected \[any, 24\]")


def test_head_without_a_layer_is_named(aesthetic):
    state = head_state()
    del state["layers.4.weight"]
    torch.save(state, aesthetic / "sac+logos+ava1-l14-linearMSE.pth")
    refused("aesthetic", aesthetic, "layers.4.weight is missing")


@pytest.mark.parametrize("name,file", [("hpsv2", "HPS_v2_compressed.pt"), ("imagereward", "ImageReward.pt")])
def test_file_of_something_else_is_named_with_its_keys(name, file, folder_of, tmp_path):
    folder = folder_of(name)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / name / file)
    refused(name, folder, file)


def test_wrong_shape_of_an_open_clip_network_is_named(hpsv2):
    path = hpsv2 / "HPS_v2_compressed.pt"
    state = torch.load(path)["state_dict"]
    torch.save({"state_dict": state | {"visual.proj": torch.zeros(2, 2)}}, path)
    refused("hpsv2", hpsv2, r"visual.proj is \[2, 2\], expected \[16, 24\]")


def test_preprocessing_for_another_size_is_refused(aesthetic):
    (aesthetic / "preprocessor_config.json").write_text(json.dumps({"size": 224, "crop_size": 224}))
    refused("aesthetic", aesthetic, "size is 224, but the network of config.json sees 32 pixels")


def test_broken_json_is_named(hpsv2):
    (hpsv2 / "open_clip_config.json").write_text("{")
    refused("hpsv2", hpsv2, "open_clip_config.json is not readable JSON")


def test_weights_file_itself_may_be_the_checkpoint(hpsv2):
    by_file = rewards.load("hpsv2", Backbones(), checkpoint=str(hpsv2 / "HPS_v2_compressed.pt"))
    by_folder = rewards.load("hpsv2", Backbones(), checkpoint=str(hpsv2))
    assert torch.equal(by_file.score(IMAGES, PROMPTS), by_folder.score(IMAGES, PROMPTS))


def test_version_2_1_is_another_file(hpsv2):
    refused("hpsv2.1", hpsv2, "HPS_v2.1_compressed.pt")
    (hpsv2 / "HPS_v2.1_compressed.pt").write_bytes((hpsv2 / "HPS_v2_compressed.pt").read_bytes())
    assert rewards.load("hpsv2.1", Backbones(), checkpoint=str(hpsv2)).name == "hpsv2.1"
