"""SDXL: the pipeline's own images without noise, its conditions, folders of other kinds, and a VAE that overflows."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from helpers import tdpo
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.models import kohya, lora_file
from tdpo_cli.models.families.sdxl import StableDiffusionXL
from tdpo_cli.models.loading import DTYPES
from tdpo_cli.randomness import Randomness
from tdpo_cli.sampling.generate import generate

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="writing tiny pipelines needs transformers 5")
PROMPTS = ["a cat", "a photo of a dog on the moon"]


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[3] / "families"))
    import make_tiny

    out = tmp_path_factory.mktemp("sdxl")
    return {variant: make_tiny.build("sdxl", out / f"sdxl-{variant}", variant) for variant in (1, 2)}


@pytest.fixture
def folder(pipelines, tmp_path):
    """A whole, ordinary folder to change."""
    return Path(shutil.copytree(pipelines[1], tmp_path / "model"))


def load(folder, trainable=False, negative_prompt="", **settings):
    model = Model(base=str(folder), **{"dtype": "fp32", "lora_rank": 2, **settings})
    return models.load(model, trainable=trainable, negative_prompt=negative_prompt)


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def ours_and_theirs(policy, steps, guidance, negative_prompt):
    policy.set_schedule(steps, 0.0)
    (ours,) = generate(policy, PROMPTS, [0, 1], Randomness(0, "sample"), guidance, 2)
    pipeline, (height, width) = policy.family.pipeline, (side * policy.family.pipeline.vae_scale_factor for side in policy.latent_shape[1:])
    latents = Randomness(0, "sample").initial_latents(0, [0, 1], policy.latent_shape)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance, latents=latents, output_type="pt",
        negative_prompt=[negative_prompt] * 2 if negative_prompt else None,
    )  # fmt: skip
    return ours, theirs.images


# 9 latents of 8 pixels: no multiple of what the UNet halves
CALLS = list(itertools.product((1, 2), (None, (64, 128), (72, 64)), ((5.0, ""), (5.0, "ugly"), (1.0, ""))))
QUICK_CALLS = [(1, None, (5.0, "ugly"))]


@pytest.mark.parametrize(
    ("variant", "resolution", "guidance", "negative"),
    [pytest.param(*call[:2], *call[2], marks=() if call in QUICK_CALLS else pytest.mark.slow) for call in CALLS],
)
def test_sampling_without_noise_is_the_pipelines_call(pipelines, variant, resolution, guidance, negative):
    ours, theirs = ours_and_theirs(load(pipelines[variant], negative_prompt=negative, resolution=resolution), 4, guidance, negative)
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() * 255 < 0.01  # a wrong condition costs more than 0.9 levels on average


def test_conditions_are_two_encoders_a_pooled_vector_and_the_size(pipelines):
    texts = load(pipelines[1], resolution=(64, 128)).encode(PROMPTS)
    assert {name: tuple(part.shape) for name, part in texts.parts.items()} == {"embeds": (3, 77, 40), "pooled": (3, 24), "time_ids": (3, 6)}
    assert texts.parts["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * 3


@pytest.mark.slow
def test_empty_negative_prompt_is_zeros_where_the_pipeline_says_so(pipelines):
    zeros, encoded = (load(pipelines[variant]).encode(PROMPTS).parts for variant in (1, 2))
    assert not zeros["embeds"][-1].any() and not zeros["pooled"][-1].any() and zeros["time_ids"][-1].any()
    assert encoded["embeds"][-1].any() and encoded["pooled"][-1].any()
    assert load(pipelines[1], negative_prompt="ugly").encode(PROMPTS).parts["embeds"][-1].any()


# --- the schedule -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_schedule_keeps_spacing_offset_and_prediction_type(pipelines, folder):
    euler, trailing = load(pipelines[1]), load(pipelines[2])
    for policy in (euler, trailing):
        policy.set_schedule(4, 1.0)
    assert euler.timesteps.tolist() == [751, 501, 251, 1] and euler.sampler.prediction_type == "epsilon"
    assert trailing.timesteps.tolist() == [999, 749, 499, 249] and trailing.sampler.prediction_type == "v_prediction"
    edit(folder / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler", steps_offset=0)
    policy = load(folder)
    policy.set_schedule(4, 1.0)
    assert policy.timesteps.tolist() == [750, 500, 250, 0]


@pytest.mark.parametrize(("name", "clips"), [("EulerDiscreteScheduler", False), ("DPMSolverMultistepScheduler", False), ("DDIMScheduler", True)])
def test_clip_sample_is_false_where_the_schedulers_class_never_clips(folder, name, clips):
    edit(folder / "scheduler/scheduler_config.json", _class_name=name, clip_sample=...)
    policy = load(folder)
    policy.set_schedule(4, 1.0)
    assert (policy.sampler.clip_sample_range is not None) == clips


def test_scheduler_of_another_diffusion_is_refused(folder):
    edit(folder / "scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    with pytest.raises(RequestError, match="its scheduler is EDMDPMSolver"):
        load(folder)


# --- the VAE ----------------------------------------------------------------------------------------------------------
def in_dtype(folder, dtype):
    """The family as a GPU would have it: in the preset's dtype, here on the CPU."""
    return StableDiffusionXL.load(str(folder), Model(base=str(folder)), DTYPES[dtype], torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "force", "expected"), [("fp16", True, "fp32"), ("fp16", False, "fp16"), ("bf16", True, "bf16"), ("fp32", True, "fp32")]
)
def test_vae_computes_in_fp32_where_fp16_overflows(folder, dtype, force, expected):
    edit(folder / "vae/config.json", force_upcast=force)
    family = in_dtype(folder, dtype)
    assert family.pipeline.vae.dtype == DTYPES[expected]
    assert family.network.dtype == family.pipeline.text_encoder_2.dtype == DTYPES[dtype]


def test_vae_that_overflows_is_named_and_gives_no_image(pipelines):
    family = in_dtype(pipelines[2], "fp16")
    latents = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    assert family.decode(latents).isfinite().all()
    family.pipeline.vae.half()
    with pytest.raises(WorkError, match=r"VAE decoded an image that is not finite, in float16.*model.vae=.*sdxl-vae-fp16-fix"):
        family.decode(latents)


def test_latents_that_are_not_finite_are_told_from_an_overflow_of_the_vae(pipelines):
    policy = load(pipelines[1])
    with pytest.raises(WorkError, match="latents are not finite"):
        policy.decode(torch.full((1, *policy.latent_shape), float("nan")))


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["", "vae"])
def test_another_vae_is_read_from_its_own_folder_or_a_pipelines(pipelines, tmp_path, inside):
    policy = load(pipelines[1])
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    other = AutoencoderKL.from_pretrained(pipelines[1], subfolder="vae")
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.3)
    other.save_pretrained(tmp_path / "other" / inside)
    changed = load(pipelines[1], vae=str(tmp_path / "other"))
    assert (changed.decode(latents) - policy.decode(latents)).abs().max() > 0.05
    with pytest.raises(RequestError, match="model.vae /nowhere: no such folder"):
        load(pipelines[1], vae="/nowhere")
    with pytest.raises(RequestError, match=r"its UNet takes 4 channels and its VAE makes 8"):
        load(pipelines[1], vae=str(pipelines[2]))
    with pytest.raises(RequestError, match="hf download someone/vae"):
        load(pipelines[1], vae="someone/vae")


# --- other kinds of models ----------------------------------------------------------------------------------------------
def refiner(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True, text_encoder=[None, None])


def inpainting(folder):
    edit(folder / "unet/config.json", in_channels=9)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    kernel = tensors["conv_in.weight"]
    save_file(tensors | {"conv_in.weight": torch.cat([kernel, kernel, kernel[:, :1]], dim=1)}, file)


OTHERS = {
    "refiner": (refiner, "an SDXL refiner"),
    "inpainting": (inpainting, "takes 9 channels and its VAE makes 4"),
    "no second encoder": (lambda f: edit(f / "model_index.json", text_encoder_2=...), "does not list text_encoder_2"),
    "no second encoder's folder": (lambda f: shutil.rmtree(f / "text_encoder_2"), "there is no text_encoder_2/"),
    "an LCM's UNet": (lambda f: edit(f / "unet/config.json", time_cond_proj_dim=8), "lack|reads the guidance scale"),
    "other conditions": (lambda f: edit(f / "unet/config.json", addition_time_embed_dim=4), "reads conditions .* parts of different models"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model_is_one_clear_message(folder, name):
    change, message = OTHERS[name]
    change(folder)
    with pytest.raises(RequestError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.slow
def test_pipelines_that_change_images_are_sampled_and_not_trained(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert isinstance(load(folder).family.pipeline, StableDiffusionXLPipeline)
    with pytest.raises(RequestError, match="a StableDiffusionXLImg2ImgPipeline, made to change images"):
        load(folder, trainable=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sdxl-turbo", "turbo"), ("SDXL-Lightning", "lightning"), ("DreamShaperXL_Turbo_v2", "turbo"), ("FLUX.1-schnell", "schnell"),
        ("lcm-sdxl", "lcm"), ("Hyper-SD", "hyper"), ("SDXLTurbo", "turbo"),
        ("Z-Image-Turbo", "turbo"), ("Qwen-Image-Lightning", "lightning"), ("FLUX.2-klein-base-4B", None), ("Z-Image", None),
        ("hyperrealism-xl", None), ("stable-diffusion-xl-base-1.0", None), ("turbotext", None),
    ],
)  # fmt: skip
def test_names_say_that_a_model_is_distilled(name, says):
    assert models.distilled(f"turbo-owner/{name}", {}) == (says and f"its name says {says}")


@pytest.mark.slow
def test_distilled_models_are_sampled_and_trained_only_on_request(folder):
    turbo = folder.rename(folder.parent / "sdxl-turbo")
    load(turbo)
    with pytest.raises(RequestError, match=r"distilled to few steps \(its name says turbo\).*--allow-distilled"):
        load(turbo, trainable=True)
    assert load(turbo, trainable=True, allow_distilled=True).trainable
    plain = turbo.rename(folder)
    edit(plain / "model_index.json", is_distilled=True)
    with pytest.raises(RequestError, match="model_index.json says is_distilled"):
        load(plain, trainable=True)


@pytest.mark.slow
def test_folder_with_fp16_files_only_is_the_same_model(pipelines, tmp_path):
    StableDiffusionXLPipeline.from_pretrained(pipelines[1], dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    weights = [file.name for file in (tmp_path / "half").rglob("*.safetensors")]
    assert len(weights) == 4 and all(".fp16." in name for name in weights)
    whole, half = load(pipelines[1]), load(tmp_path / "half")
    for name, part in whole.encode(PROMPTS).parts.items():
        torch.testing.assert_close(half.encode(PROMPTS).parts[name], part, rtol=0, atol=0.05)


# --- LoRA -------------------------------------------------------------------------------------------------------------
def drawn(policy, seed=1):
    """Weights that matter in an adapter that is new."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return policy


@torch.no_grad()
def predicted(policy, reference=False):
    policy.set_schedule(4, 1.0)
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.predict(x_t, torch.tensor([0, 3]), policy.encode(PROMPTS), torch.tensor([0, 1]), 5.0, reference)


@pytest.mark.slow
def test_lora_alpha_and_targets_are_the_presets(pipelines, tmp_path):
    policy = drawn(load(pipelines[1], trainable=True, lora_rank=4, lora_alpha=2.0, lora_targets=("to_q", "ff.net.2")))
    assert {name.split(".lora_")[0].rpartition("transformer_blocks.")[2].split(".", 1)[1] for name in policy.trainable} == {
        "attn1.to_q", "attn2.to_q", "ff.net.2",
    }  # fmt: skip
    policy.save(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines[1])
    pipeline.load_lora_weights(tmp_path)
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 2)
    torch.testing.assert_close(predicted(load(pipelines[1], start_from=str(tmp_path))), predicted(policy))
    with pytest.raises(RequestError, match="model.lora_targets nothing"):
        load(pipelines[1], trainable=True, lora_targets=("nothing",))


@pytest.mark.slow
def test_lora_is_loaded_by_diffusers(pipelines, tmp_path):
    policy = drawn(load(pipelines[2], trainable=True, lora_rank=3))
    policy.save(tmp_path)
    trained, plain = load(pipelines[2], start_from=str(tmp_path)), load(pipelines[2])
    torch.testing.assert_close(predicted(trained), predicted(policy))
    ours, _ = ours_and_theirs(trained, 3, 5.0, "")
    plain.family.pipeline.load_lora_weights(tmp_path)
    _, theirs = ours_and_theirs(plain, 3, 5.0, "")
    assert (ours - theirs).abs().max() * 255 < 0.01


# --- an artist's LoRA to start from -------------------------------------------------------------------------------------
def artists(pipelines, folder, kohya_names, text):
    """A LoRA as trained elsewhere: ranks that differ, alpha unlike rank, in diffusers' or kohya's names; and a pipeline that has it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines[1])
    draw = torch.Generator().manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "ff.net.2"], rank_pattern={"to_v": 6}, alpha_pattern={"to_v": 3})
    encoders = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1"])
    parts = {"unet": config, **({"text_encoder": encoders, "text_encoder_2": encoders} if text else {})}
    given = {}
    for name, one in parts.items():
        network = getattr(pipeline, name)
        inject_adapter_in_model(one, network, adapter_name="artist")
        for parameter in (p for key, p in network.named_parameters() if "lora_" in key):
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
        network.peft_config = {"artist": one}
        state = get_peft_model_state_dict(network, adapter_name="artist")
        given |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": one.to_dict()}
    pipeline.save_lora_weights(folder, **given)
    if kohya_names:
        file = lora_file.find(folder)
        converted = kohya.convert(load_file(file), pipeline.unet.config.layers_per_block, lora_file.alpha_of(file))
        file.unlink()
        save_file(converted, file)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("kohya_names", [pytest.param(False, marks=pytest.mark.slow), True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("text", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unet", "with text encoders"])
def test_artists_lora_is_where_training_starts(pipelines, tmp_path, kohya_names, text):
    theirs = artists(pipelines, tmp_path / "artist", kohya_names, text)
    start = {"start_from": str(tmp_path / "artist"), "lora_rank": 2}
    if text:
        with pytest.raises(RequestError, match=r"has \d+ weights of text encoders .*text_lora=fuse"):
            load(pipelines[1], trainable=True, **start)
    policy = load(pipelines[1], trainable=True, text_lora="fuse", **start)
    texts = policy.encode(PROMPTS)
    embeds, _, pooled, _ = theirs.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(texts.parts["embeds"][:2], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(texts.parts["pooled"][:2], pooled, rtol=0, atol=1e-5)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.family.denoise(x, torch.tensor([500, 20]), texts[:2], 1.0)
        policy.family.network, network = theirs.unet, policy.family.network
        expected = policy.family.denoise(x, torch.tensor([500, 20]), texts[:2], 1.0)
        policy.family.network = network
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(predicted(policy, reference=True), predicted(policy), rtol=0, atol=0)

    drawn(policy)
    policy.save(tmp_path / "both")
    assert not torch.allclose(predicted(policy), predicted(policy, reference=True), atol=1e-2)
    again = load(pipelines[1], start_from=str(tmp_path / "both"))
    torch.testing.assert_close(predicted(again), predicted(policy), rtol=0, atol=2e-4)
    torch.testing.assert_close(again.encode(PROMPTS).parts["pooled"], policy.encode(PROMPTS).parts["pooled"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "kind"),
    [("dora_scale", "DoRA"), pytest.param("hada_w1_a", "LoHa", marks=pytest.mark.slow), pytest.param("lokr_w1", "LoKr", marks=pytest.mark.slow)],
)
def test_other_adapters_are_refused_by_name(pipelines, tmp_path, mark, kind):
    artists(pipelines, tmp_path, True, False)
    file = lora_file.find(tmp_path)
    tensors = load_file(file)
    layer = next(iter(tensors)).partition(".")[0]
    save_file(tensors | {f"{layer}.{mark}": torch.ones(1)}, file)
    for trainable in (True, False):
        with pytest.raises(RequestError, match=rf"a {kind} adapter \({layer}.{mark}\)"):
            load(pipelines[1], trainable=trainable, start_from=str(tmp_path))


@pytest.mark.slow
def test_lora_of_another_size_is_one_message(pipelines, tmp_path):
    drawn(load(pipelines[2], trainable=True)).save(tmp_path)
    with pytest.raises(RequestError, match="do not fit the base model"):
        load(pipelines[1], trainable=True, start_from=str(tmp_path))


# --- the commands -----------------------------------------------------------------------------------------------------
def command(*arguments):
    outcome = tdpo(*arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out


@pytest.fixture(scope="module")
def half(pipelines, tmp_path_factory):
    """A model of which only fp16 files are there."""
    folder = tmp_path_factory.mktemp("half") / "model"
    StableDiffusionXLPipeline.from_pretrained(pipelines[2], dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture(scope="module")
def run(half, tmp_path_factory):
    """One epoch, with the presets' fp16, of pictures that are not square."""
    place = tmp_path_factory.mktemp("runs")
    preset = tiny.preset(
        place, model__base=str(half), model__resolution=[40, 64], model__dtype="fp16", reward__train="jpeg-incompressibility",
        rollout__prompts="simple-animals", run__epochs=1,
    )  # fmt: skip
    facts = json.loads(command("train", "--preset", preset, "--dry-run", "--json"))
    assert facts["preset"]["model"]["resolution"] == [40, 64] and facts["flops_per_epoch"] > 0
    assert not (place / "run").exists()
    command("train", "--preset", preset, "--out", place / "run", "--quiet")
    return place / "run"


@pytest.mark.slow
def test_commands_sample_and_export_a_run(run, tmp_path):
    from PIL import Image

    command("sample", run / "checkpoints/epoch_0000", "a cat", "--out", tmp_path / "images", "--per-prompt", 2, "--quiet")
    sizes = {Image.open(file).size for file in (tmp_path / "images").rglob("*.png") if file.name != "grid.png"}
    assert sizes == {(64, 40)}
    command("export", run, "--format", "kohya", "--out", tmp_path / "artist.safetensors", "--quiet")
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "artist.safetensors"))


@pytest.mark.slow
def test_command_compares_a_run_with_its_base(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command(
        "cross-eval", run, "--prompts", tmp_path / "prompts.txt", "--rewards", "jpeg-incompressibility", "--out", tmp_path / "compared", "--quiet"
    )  # fmt: skip
    table = json.loads((tmp_path / "compared/cross_eval.json").read_text())
    assert "jpeg-incompressibility" in json.dumps(table)


@pytest.mark.slow
def test_run_that_starts_from_a_lora_with_text_encoders_resumes_to_the_same(pipelines, tmp_path):
    artists(pipelines, tmp_path / "artist", False, True)
    preset = tiny.preset(
        tmp_path, model__base=str(pipelines[1]), model__start_from=str(tmp_path / "artist"), model__text_lora="fuse",
        reward__train="jpeg-incompressibility", rollout__prompts="simple-animals",
    )  # fmt: skip
    command("train", "--preset", preset, "--out", tmp_path / "straight", "--epochs", 2, "--quiet")
    command("train", "--preset", preset, "--out", tmp_path / "stopped", "--epochs", 1, "--quiet")
    command("train", "--resume", "--out", tmp_path / "stopped", "--epochs", 2, "--quiet")
    (rows, weights), expected = tiny.outcome_of(tmp_path / "stopped"), tiny.outcome_of(tmp_path / "straight")
    assert len(rows) == 2 and any("text_encoder" in name for name in load_file(tmp_path / "stopped" / max(weights)))
    assert (rows, weights) == expected
