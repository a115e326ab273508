"""What is peculiar to Stable Diffusion 3 and FLUX.1; what they share with all families is in tests/families."""

import json
import shutil

import pytest
import torch
from flow_models import SD3

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.models.families.flux import Flux
from tdpo_cli.models.families.sd3 import StableDiffusion3
from tdpo_cli.models.policy import Policy

PROMPTS = ["a small dog", "blue tree"]


def load(folder=SD3, **settings):
    return models.load(Model(**{"base": str(folder), "dtype": "fp32", "lora_rank": 2, **settings}))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A FluxPipeline with the trace's VAE and CLIP, a small transformer of its own, and a schedule that depends on the resolution."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("flux")
    parts = {"vae": "vae", "text_encoder_2": "text_encoder_3", "tokenizer": "tokenizer", "tokenizer_2": "tokenizer_3", "scheduler": "scheduler"}
    for name, source in parts.items():
        shutil.copytree(SD3 / source, folder / name)
    write_clip(folder / "text_encoder")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=12, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"use_dynamic_shifting": True}))
    index = {
        "_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "image_encoder": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_clip(folder):
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = json.loads((SD3 / "text_encoder/config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12}
    CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)


# --- Stable Diffusion 3 ---------------------------------------------------------------------------------------------------------
def test_lora_is_on_the_joint_attention_only():
    """Not on the second attention of the dual blocks, not on the feed-forward layers."""
    names = {name.rpartition(".lora_")[0] for name in load().trainable}
    assert all(".attn." in name for name in names)
    ends = {name.rpartition(".attn.")[2] for name in names}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


@pytest.mark.slow
def test_drop_t5_puts_zeros_in_place_of_its_tokens():
    whole, without = load(), load(drop_t5=True)
    assert without.family.pipeline.text_encoder_3 is without.family.pipeline.tokenizer_3 is None
    embeds = [policy.encode(PROMPTS).parts["embeds"] for policy in (whole, without)]
    assert embeds[0].shape == embeds[1].shape == (3, 77 + 256, 32)
    assert torch.equal(embeds[0][:, :77], embeds[1][:, :77])
    assert embeds[0][:, 77:].abs().max() > 0 and not embeds[1][:, 77:].any()
    assert (whole.family.prompt_limit, without.family.prompt_limit) == (256, 77)


@pytest.mark.slow
def test_a_folder_without_t5_files_names_the_way_out(tmp_path):
    folder = shutil.copytree(SD3, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(RequestError, match=r"no text_encoder_3/.* Or train without T5: --set model.drop_t5=true"):
        load(folder)
    load(folder, drop_t5=True)
    index = json.loads((folder / "model_index.json").read_text())
    unlisted = {name: entry for name, entry in index.items() if name not in ("text_encoder_3", "tokenizer_3")}
    (folder / "model_index.json").write_text(json.dumps(unlisted))
    load(folder, drop_t5=True)
    with pytest.raises(RequestError, match=r"does not list text_encoder_3, tokenizer_3.* Or train without T5"):
        load(folder)


def test_drop_t5_is_refused_by_another_family(flux_folder):
    with pytest.raises(RequestError, match=r"model.drop_t5 is for Stable Diffusion 3; FLUX.1 needs all its text encoders"):
        load(flux_folder, drop_t5=True)


def test_a_resolution_without_positions_is_refused():
    largest = json.loads((SD3 / "transformer/config.json").read_text())["pos_embed_max_size"] * 2 * 2  # patches of 2, latents of 2 pixels
    assert load(resolution=(largest, largest)).latent_shape[1:] == (largest // 2, largest // 2)
    with pytest.raises(RequestError, match=f"positions for at most {largest} a side"):
        load(resolution=(largest + 4, largest))


def test_the_network_is_given_the_timestep_in_thousands(monkeypatch):
    policy = load()
    policy.set_schedule(4)
    assert call_of(policy, monkeypatch)["timestep"].tolist() == [1000.0]


# --- FLUX.1 ---------------------------------------------------------------------------------------------------------------------
def call_of(policy, monkeypatch, guidance=1.0):
    """Keywords of the network's call at the first step."""
    given = {}
    hook = policy.family.network.register_forward_pre_hook(lambda module, arguments, keywords: given.update(keywords), with_kwargs=True)
    row = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        policy.predict(torch.zeros(1, *policy.latent_shape), row, policy.encode(PROMPTS), row, guidance)
    hook.remove()
    return given


def test_embedded_guidance_is_the_plain_scale_in_one_call(flux_folder, monkeypatch):
    policy = load(flux_folder, resolution=(16, 32))
    policy.set_schedule(4)
    assert policy.family.guidance == "embedded"
    call = call_of(policy, monkeypatch, guidance=3.5)
    assert call["guidance"].tolist() == [3.5] and call["timestep"].tolist() == [1.0]
    assert call["hidden_states"].shape == (1, 4 * 8, 16)
    assert call["img_ids"][:, 1].max() == 3 and call["img_ids"][:, 2].max() == 7 and not call["txt_ids"].any()


@pytest.mark.slow
def test_without_the_embedding_guidance_is_classifier_free(flux_folder, tmp_path, monkeypatch):
    from diffusers import FluxTransformer2DModel

    folder = shutil.copytree(flux_folder, tmp_path / "flux")
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    FluxTransformer2DModel.from_config(config | {"guidance_embeds": False}).save_pretrained(folder / "transformer")
    policy = load(folder, resolution=(16, 16))
    policy.set_schedule(4)
    assert policy.family.guidance == "cfg"
    call = call_of(policy, monkeypatch, guidance=3.5)
    assert call["guidance"] is None and len(call["hidden_states"]) == 2


def test_packing_is_undone(flux_folder):
    family = load(flux_folder, resolution=(16, 24)).family
    latents = torch.arange(2 * 4 * 8 * 12.0).view(2, *family.latent_shape)
    packed = family.pack(latents)
    # a token: channel, row, column of its 2 x 2 square
    assert packed[0, 1].tolist() == [latents[0, c, row, 2 + column] for c in range(4) for row in range(2) for column in range(2)]
    assert torch.equal(family.unpack(packed, 8, 12), latents)


@pytest.mark.slow
def test_the_schedule_depends_on_the_resolution(flux_folder):
    small, large = (load(flux_folder, resolution=(side, side)) for side in (16, 64))
    assert [policy.family.tokens for policy in (small, large)] == [16, 256]
    assert small.family.mu(4) < large.family.mu(4) == pytest.approx(0.5)
    for policy in (small, large):
        policy.set_schedule(4)
    assert small.timesteps[1] < large.timesteps[1]


def test_limits_are_t5s(flux_folder):
    family = load(flux_folder, resolution=(16, 16)).family
    assert (Flux.t5_length, StableDiffusion3.t5_length, family.prompt_limit) == (512, 256, 512)
    long = " ".join(["dog"] * 600)
    assert family.longer_than_limit(["a dog", long]) == [long]


# --- both -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_text_encoders_are_on_the_device_only_while_they_encode(monkeypatch):
    policy = load()
    moves = []
    monkeypatch.setattr(StableDiffusion3, "move_text_encoders", lambda self, device: moves.append(str(device)))
    policy.encode(PROMPTS)
    assert moves == []  # nothing moves on a CPU
    encode, where = StableDiffusion3.encode, policy.family.device
    monkeypatch.setattr(StableDiffusion3, "encode", lambda self, prompts: moves.append("encode") or _on(self, where, encode, prompts))
    policy.family.device = torch.device("cuda")
    Policy(policy.family, policy.adapter).encode(PROMPTS)
    assert moves == ["cuda", "encode", "cpu"] * 2  # the negative prompt, then the prompts


def _on(family, device, encode, prompts):
    """Encode where the weights are, whatever the family calls its device."""
    called, family.device = family.device, device
    try:
        return encode(family, prompts)
    finally:
        family.device = called


def test_moving_text_encoders_moves_them_and_nothing_else():
    family = load().family
    with torch.inference_mode():
        family.move_text_encoders("meta")
    pipeline = family.pipeline
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        assert {weight.device.type for weight in part.parameters()} == {"meta"}
    assert {weight.device.type for part in (pipeline.vae, family.network) for weight in part.parameters()} == {"cpu"}


def test_shown_images_have_no_noise_unless_asked_for():
    policy = load()
    assert not policy.scheduled(4).stochastic.any()
    assert policy.scheduled(4, 0.7).stochastic.tolist() == [True, True, True, False]


@pytest.mark.slow
def test_settings_of_ddim_are_refused():
    policy = load()
    with pytest.raises(RequestError, match="rollout.dynamics ddim is not for flow-matching models. These are: flow-sde, cps, dance-sde"):
        policy.set_schedule(4, dynamics="ddim")
    with pytest.raises(RequestError, match="3 noise levels for 4 denoising steps"):
        policy.set_schedule(4, [0.7, 0.7, 0.0])
    sandbox = models.load(Model(base="sandbox", dtype="fp32"))
    with pytest.raises(RequestError, match="rollout.dynamics cps is for flow-matching models"):
        sandbox.set_schedule(4, dynamics="cps")
    with pytest.raises(RequestError, match="rollout.window is for flow-matching models"):
        sandbox.set_schedule(4, window=(0, 2))
