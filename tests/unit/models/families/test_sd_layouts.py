"""Stable Diffusion folders as they lie about: every layout loads as the same policy, every broken one says what is missing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from tdpo_cli import models
from tdpo_cli.config.settings import Model, Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.models import lora_file
from tdpo_cli.models.samplers.ddim import DDIM
from tdpo_cli.storage.run_dir import RunDir

SOURCE = Path(__file__).parents[3] / "data" / "trace_a" / "model" / "pipeline"
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(SOURCE, safety_checker=None, requires_safety_checker=False)


@pytest.fixture
def folder(tmp_path):
    """A whole, ordinary folder to damage."""
    shutil.copytree(SOURCE, tmp_path / "model")
    return tmp_path / "model"


def load(folder, **settings):
    return models.load(Model(base=str(folder), dtype="fp32", **{"lora_rank": 2, **settings}))


@torch.no_grad()
def outputs(policy):
    """What the four networks and the schedule make of fixed inputs."""
    policy.set_schedule(4, 1.0)
    draw = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *policy.latent_shape, generator=draw)
    texts = policy.encode(["a cat", "a dog"])
    transition = policy.transition(x_t, torch.tensor([0, 3]), texts, torch.tensor([0, 1]), 5.0)
    return {"embeds": texts.parts["embeds"], "mean": transition.mean, "std": transition.std, "image": policy.decode(x_t)}


@pytest.fixture(scope="module")
def expected():
    return outputs(load(SOURCE))


def assert_same(ours, expected, tolerance=0.0):
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- layouts ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_safetensors_and_pickled_weights_are_the_same_policy(pipeline, tmp_path, expected):
    pipeline.save_pretrained(tmp_path / "safe")
    pipeline.save_pretrained(tmp_path / "bin", safe_serialization=False)
    # transformers writes safetensors only; old uploads have its weights pickled
    text = tmp_path / "bin/text_encoder"
    torch.save(load_file(text / "model.safetensors"), text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    assert not list((tmp_path / "bin").rglob("*.safetensors"))
    assert_same(outputs(load(tmp_path / "safe")), expected)
    assert_same(outputs(load(tmp_path / "bin")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_with_fp16_files_only_loads(tmp_path, expected, pickled):
    half = StableDiffusionPipeline.from_pretrained(SOURCE, safety_checker=None, requires_safety_checker=False, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", safe_serialization=not pickled)
    if pickled:
        text = tmp_path / "text_encoder"
        file = next(text.glob("*.safetensors"))
        torch.save(load_file(file), text / "pytorch_model.fp16.bin")
        file.unlink()
    weights = [file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".safetensors")]
    assert len(weights) == 3 and all(".fp16." in name for name in weights)
    policy = load(tmp_path)
    assert policy.family.network.dtype == torch.float32  # a CPU computes in fp32
    assert_same(outputs(policy), expected, tolerance=0.05)


@pytest.mark.slow
def test_plain_files_are_preferred_where_both_lie(pipeline, tmp_path, expected):
    pipeline.save_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        file = next((tmp_path / part).glob("*.safetensors"))
        save_file({name: torch.zeros_like(t).half() for name, t in load_file(file).items()}, str(file).replace(".safetensors", ".fp16.safetensors"))
    assert_same(outputs(load(tmp_path)), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_load(pipeline, tmp_path, expected, variant):
    pipeline.save_pretrained(tmp_path, variant=variant)
    shutil.rmtree(tmp_path / "unet")
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert_same(outputs(load(tmp_path)), expected)


@pytest.mark.slow
def test_safety_checker_in_the_index_is_never_loaded(folder, expected):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index |= {"requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert not (folder / "safety_checker").exists()
    assert_same(outputs(load(folder)), expected)


@pytest.mark.slow
def test_keys_that_old_uploads_have_too_many_are_harmless(folder, expected):
    """Old text encoders carry position_ids."""
    file = folder / "text_encoder/model.safetensors"
    save_file({**load_file(file), "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert_same(outputs(load(folder)), expected)


@pytest.mark.parametrize(("version", "said", "side"), [("0.4.0", 32, 64), ("0.17.1", 32, 32), ("0.4.0", 8, 8)])
def test_the_first_uploads_latent_size_is_repaired(folder, version, said, side):
    edit(folder / "unet/config.json", _diffusers_version=version, sample_size=said)
    assert load(folder).latent_shape == (4, side, side)


def test_a_wide_unet_makes_wide_latents(folder):
    edit(folder / "unet/config.json", sample_size=[8, 16])
    assert load(folder).latent_shape == (4, 8, 16)


def edit(file, **changes):
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# --- schedulers -------------------------------------------------------------------------------------------------------
SCHEDULERS = {
    "pndm": PNDMScheduler(**SD1, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "pndm, old offset": PNDMScheduler(**SD1, skip_prk_steps=True),
    "ddim": DDIMScheduler(**SD1, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim, old offset, alpha to one": DDIMScheduler(**SD1, clip_sample=False, set_alpha_to_one=True, steps_offset=0),
    "euler": EulerDiscreteScheduler(**SD1),
    "euler, leading": EulerDiscreteScheduler(**SD1, timestep_spacing="leading", steps_offset=1),
    "dpm++": DPMSolverMultistepScheduler(**SD1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_becomes_the_same_ddim(folder, expected, name):
    SCHEDULERS[name].save_pretrained(folder / "scheduler")
    edit(folder / "scheduler/scheduler_config.json", clip_sample=False)
    policy = load(folder)
    ours = outputs(policy)
    assert policy.timesteps.tolist() == [751, 501, 251, 1]
    assert_same(ours, expected)


def test_v_prediction_is_read_from_the_config(folder, expected):
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    policy = load(folder)
    assert not torch.allclose(outputs(policy)["mean"], expected["mean"], atol=1e-2)
    assert policy.sampler.prediction_type == "v_prediction"


def test_v_prediction_mean_by_hand():
    """Stable Diffusion 2.x: x0 = sqrt(abar) x - sqrt(1 - abar) v, eps = sqrt(abar) v + sqrt(1 - abar) x."""
    schedule = DDIM.of({**SD1, "prediction_type": "v_prediction", "clip_sample": False}, 4, 1.0)
    x_t, v = torch.tensor(0.7), torch.tensor(-0.3)
    ours = schedule.step(v.view(1, 1, 1, 1), x_t.view(1, 1, 1, 1), torch.tensor([1])).mean.item()
    abar, before, sigma = (float(t[1]) for t in (schedule.abar, schedule.abar_prev, schedule.std))
    x_0 = abar**0.5 * 0.7 + (1 - abar) ** 0.5 * 0.3
    eps = -(abar**0.5) * 0.3 + (1 - abar) ** 0.5 * 0.7
    assert ours == pytest.approx(before**0.5 * x_0 + (1 - before - sigma**2) ** 0.5 * eps, abs=1e-6)


@pytest.mark.slow
def test_zero_terminal_snr_has_finite_log_probs(folder):
    """2.x checkpoints with rescaled betas: the first step starts at abar = 0, where 1 - abar_prev - sigma^2 rounds below 0."""
    config = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    edit(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", **config)
    policy = load(folder)
    for steps in (4, 10, 50):
        policy.set_schedule(steps, 1.0)
        x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        transition = policy.transition(x, torch.tensor([0]), policy.encode(["a cat"]), torch.tensor([0]), 1.0)
        assert policy.timesteps[0] == 999
        assert transition.log_prob(transition.sample(torch.zeros_like(x))).isfinite().all()


def test_a_config_without_clip_sample_clips(folder, expected):
    """The key's default is true, and a converted PNDM config without it clips x0 in the official code too."""
    edit(folder / "scheduler/scheduler_config.json", clip_sample=...)
    policy = load(folder)
    ours = outputs(policy)
    assert policy.sampler.clip_sample_range == 1.0
    assert not torch.allclose(ours["mean"], expected["mean"])


def test_dynamic_thresholding_is_read_from_the_config(folder):
    edit(folder / "scheduler/scheduler_config.json", thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    policy = load(folder)
    policy.set_schedule(4, 1.0)
    assert (policy.sampler.threshold_ratio, policy.sampler.threshold_max) == (0.9, 2.0)


@pytest.mark.slow
def test_a_step_without_noise_cannot_be_trained_on_but_sampled(folder):
    """linspace ends at timestep 0, where the previous timestep is the same one."""
    edit(folder / "scheduler/scheduler_config.json", _class_name="DDIMScheduler", timestep_spacing="linspace")
    with pytest.raises(RequestError, match=r"step 3 of 4 \(timestep 0\) adds no noise.*'linspace'"):
        load(folder).set_schedule(4, 1.0)
    models.load(Model(base=str(folder), dtype="fp32"), trainable=False).set_schedule(4, 1.0)


@pytest.mark.slow
def test_eta_0_cannot_be_trained_on_but_sampled(folder):
    with pytest.raises(RequestError, match="rollout.eta is 0.0"):
        load(folder).set_schedule(4, 0.0)
    models.load(Model(base=str(folder), dtype="fp32"), trainable=False).set_schedule(4, 0.0)


@pytest.mark.parametrize("steps", [999, 600, 50, 7, 1])
def test_every_step_adds_noise_at_any_number_of_steps(steps):
    schedule = DDIM.of({**SD1, "_class_name": "PNDMScheduler", "clip_sample": False, "steps_offset": 1}, steps, 1.0)
    assert len(schedule) == steps
    assert (schedule.std > 0).all() and schedule.std.isfinite().all()


def test_more_steps_than_the_model_has_is_refused():
    with pytest.raises(RequestError, match="rollout.steps 1000 is too many.*at most 999"):
        DDIM.of({**SD1, "_class_name": "PNDMScheduler"}, 1000, 1.0)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(RequestError, match="prediction_type is 'flow'; supported: epsilon, sample, v_prediction"):
        DDIM.of({**SD1, "prediction_type": "flow"}, 4, 1.0)


# --- wrong and incomplete folders ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "part, key, value",
    [
        ("unet", "sample_size", 10**7), ("scheduler", "num_train_timesteps", 10**12), ("tokenizer", "model_max_length", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow) for case in (
                ("unet", "sample_size", "x"), ("unet", "sample_size", [32]), ("unet", "sample_size", -1), ("scheduler", "num_train_timesteps", 0),
                ("scheduler", "timestep_spacing", 3), ("vae", "scaling_factor", "x"), ("vae", "scaling_factor", float("nan")),
                ("tokenizer", "model_max_length", "x"),
            )
        ),
    ],
)  # fmt: skip
def test_a_number_that_no_model_has_is_named(folder, part, key, value):
    edit(folder / part / {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json"), **{key: value})
    with pytest.raises(RequestError, match=f"{part}: .*{key}|{part}: does not load"):
        load(folder)


def test_attention_that_is_a_program_from_a_hub_is_refused(folder):
    edit(folder / "text_encoder/config.json", attn_implementation="someone/kernel")
    with pytest.raises(RequestError, match="names a program from a hub, 'someone/kernel'"):
        load(folder)


def test_a_tokenizer_without_a_limit_gets_its_text_encoders(folder, expected):
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)  # as transformers writes it where none is set
    assert_same(outputs(load(folder)), expected)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_a_tensor(file):
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def swap_vae_width(folder):
    edit(folder / "unet/config.json", in_channels=9)
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    kernel = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([kernel, kernel, kernel[:, :1]], dim=1)
    save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: damaged"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: damaged"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "there is no unet/"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "there is no vae/"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "there is no text_encoder/"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer there, expected vocab.json"),
    "no vocabulary": (lambda f: (f / "tokenizer/vocab.json").unlink(), "no tokenizer there, expected vocab.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "broken scheduler": (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "cannot read its scheduler"),
    "no unet config": (lambda f: (f / "unet/config.json").unlink(), "unet: config.json is missing"),
    "broken unet config": (lambda f: (f / "unet/config.json").write_text("{"), "does not load as UNet2DConditionModel"),
    "no unet weights": (lambda f: (f / UNET).unlink(), "no weights there, expected diffusion_pytorch_model.safetensors"),
    "no text weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "no weights there, expected model.safetensors"),
    "truncated unet": (lambda f: truncate(f / UNET), "damaged, not a readable safetensors file"),
    "truncated vae": (lambda f: truncate(f / "vae/diffusion_pytorch_model.safetensors"), "damaged, not a readable safetensors file"),
    "truncated text encoder": (lambda f: truncate(f / "text_encoder/model.safetensors"), "damaged, not a readable safetensors file"),
    "empty weights": (lambda f: (f / UNET).write_bytes(b""), "damaged, not a readable safetensors file"),
    "a unet tensor missing": (lambda f: drop_a_tensor(f / UNET), "the unet weights lack conv_in.bias"),
    "a text tensor missing": (lambda f: drop_a_tensor(f / "text_encoder/model.safetensors"), "the text_encoder weights lack"),
    "unet of another size": (lambda f: edit(f / "unet/config.json", cross_attention_dim=48), "does not load as UNet2DConditionModel"),
    "text encoder of another size": (lambda f: edit(f / "text_encoder/config.json", hidden_size=48), "does not load as CLIPTextModel|parts of"),
    "tokenizer too large": (lambda f: None, "parts of different models"),
    "an inpainting unet": (swap_vae_width, "inpainting, upscaling or editing"),
    "no latent size": (lambda f: edit(f / "unet/config.json", sample_size=None), "does not say sample_size"),
    "SDXL": (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"), "does not list text_encoder_2, tokenizer_2"),
    "Sana": (lambda f: edit(f / "model_index.json", _class_name="SanaPipeline"), "SanaPipeline is not supported"),
    "SD3": (lambda f: edit(f / "model_index.json", _class_name="StableDiffusion3Pipeline"), "which a StableDiffusion3Pipeline needs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_folder_gives_one_clear_message(folder, name):
    damage, message = DAMAGE[name]
    if name == "tokenizer too large":
        file = folder / "tokenizer/vocab.json"
        vocabulary = json.loads(file.read_text())
        file.write_text(json.dumps(vocabulary | {f"extra{i}": len(vocabulary) + i for i in range(2000)}))
    else:
        damage(folder)
    with pytest.raises(RequestError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) or name == "no latent size"
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_a_missing_shard_is_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    shard = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RequestError, match="unet: does not load"):
        load(tmp_path)


def test_a_single_file_checkpoint_says_how_to_convert_it(tmp_path):
    file = tmp_path / "v1-5-pruned.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(RequestError, match=r"a single file, expected a diffusers folder[\s\S]*StableDiffusionPipeline as P; P.from_single_file"):
        load(file)


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("art.safetensors", "conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "StableDiffusionXLPipeline"),
        ("art.safetensors", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "StableDiffusion3Pipeline"),
        ("art.safetensors", "cond_stage_model.transformer.text_model.embeddings.position_ids", "StableDiffusionPipeline"),
        ("artXL_v10.ckpt", None, "StableDiffusionXLPipeline"),
    ],
)
def test_a_single_files_line_is_of_its_own_family(tmp_path, name, tensor, kind):
    from safetensors.torch import save_file

    from tdpo_cli import models

    file = tmp_path / name
    if tensor is None:
        file.write_bytes(b"pickle")
    else:
        save_file({tensor: torch.zeros(1)}, file)
    with pytest.raises(RequestError) as refused:
        models.index(str(file))
    (line,) = (line for line in str(refused.value).splitlines() if line.startswith("python -c "))
    code = line.removeprefix('python -c "').removesuffix('"')
    compile(code, "line", "exec")
    assert f"import {kind} as P" in code and repr(str(file)) in code


@pytest.mark.parametrize("base", ["/nowhere/model", "./nowhere", "nothing-of-the-kind"])
def test_a_path_that_is_not_there_is_no_hub_id(base):
    with pytest.raises(RequestError, match="no such model folder"):
        load(base)


def test_a_hub_id_that_is_not_cached_says_how_to_fetch_it():
    with pytest.raises(RequestError, match=r"hf download someone/some-model\nor give a folder: --set model.base=PATH"):
        load("someone/some-model")


# --- hub ids ------------------------------------------------------------------------------------------------------------
def in_the_cache(cache: Path, repo: str, revision: str, commit: str, source: Path) -> Path:
    """A repository as huggingface_hub keeps it."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    shutil.copytree(source, place / "snapshots" / commit)
    return place / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache that all libraries look into."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for module in [module for name, module in sys.modules.items() if name.startswith(("diffusers", "transformers.utils.hub"))]:
        if "HF_HUB_CACHE" in vars(module):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_hub_id_loads_from_the_cache_by_revision(cache, expected):
    in_the_cache(cache, "someone/tiny", "main", "a" * 40, SOURCE)
    other = in_the_cache(cache, "someone/tiny", "fp16", "b" * 40, SOURCE)
    edit(other / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert_same(outputs(load("someone/tiny")), expected)
    policy = load("someone/tiny", revision="fp16")
    policy.set_schedule(4, 1.0)
    assert policy.sampler.prediction_type == "v_prediction"
    with pytest.raises(RequestError, match="hf download someone/tiny --revision nope"):
        load("someone/tiny", revision="nope")


@pytest.mark.slow
def test_a_hub_id_with_fp16_files_only_loads_from_the_cache(cache, expected):
    place = in_the_cache(cache, "someone/half", "main", "d" * 40, SOURCE)
    for part in ("unet", "vae", "text_encoder"):
        file = next((place / part).glob("*.safetensors"))
        file.rename(str(file).replace(".safetensors", ".fp16.safetensors"))
    assert_same(outputs(load("someone/half")), expected)


def test_a_half_fetched_hub_id_says_what_is_missing(cache):
    place = in_the_cache(cache, "someone/partial", "main", "c" * 40, SOURCE)
    (place / UNET).unlink()
    with pytest.raises(RequestError, match=r"someone/partial, unet: does not load.*hf download someone/partial"):
        load("someone/partial")


# --- model.start_from ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA of rank 2 with weights that matter, as a run's checkpoint writes it, and what it makes."""
    run = tmp_path_factory.mktemp("runs") / "run"
    policy = load(SOURCE)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    folder = RunDir(run)
    folder.write_preset(Preset())
    folder.save_checkpoint(0, lambda path: load(SOURCE).save(path), "digest", None)
    checkpoint = folder.save_checkpoint(4, policy.save, "digest", None)
    save_file({"layers.0.weight": torch.zeros(1)}, checkpoint / "critic.safetensors")  # lies there too
    return run, checkpoint, outputs(policy)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "checkpoint", "run"])
def test_training_starts_from_a_lora_file_a_checkpoint_or_a_run(trained, expected, how):
    run, checkpoint, made = trained
    start = {"file": checkpoint / lora_file.FILE, "checkpoint": checkpoint, "run": run}[how]
    policy = load(SOURCE, start_from=str(start))
    assert_same(outputs(policy), made)
    assert not torch.allclose(made["mean"], expected["mean"], atol=1e-3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.trainable.values())


@pytest.mark.slow
def test_the_reference_is_what_training_started_from(trained):
    """The loaded LoRA is part of it; ours lies beside it, new, and moves the policy alone."""
    policy = load(SOURCE, start_from=str(trained[1]), lora_rank=3)  # the ranks need not agree
    policy.set_schedule(4, 1.0)
    assert set(name.rpartition(".lora_")[2] for name in policy.trainable) == {"A.beside.weight", "B.beside.weight"}
    assert_same(outputs(policy), trained[2])
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(0.1)
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = x_t, torch.tensor([0, 3]), policy.encode(["a cat", "a dog"]), torch.tensor([0, 1]), 5.0
    with torch.no_grad():
        reference, moved = policy.transition(*arguments, reference=True), policy.transition(*arguments)
    torch.testing.assert_close(reference.mean, trained[2]["mean"], rtol=0, atol=0)
    assert not torch.allclose(moved.mean, reference.mean, atol=1e-3)
    assert all(p.requires_grad == (".beside." in name) for name, p in policy.family.network.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_checkpoint_holds_the_loaded_and_the_trained_lora_as_one(trained, tmp_path, alpha):
    policy = load(SOURCE, start_from=str(trained[1]), lora_rank=3, lora_alpha=alpha, lora_targets=("to_q", "ff.net.2"))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    policy.save(tmp_path / "both")
    ranks = {tensor.shape[0] for name, tensor in load_file(tmp_path / "both" / lora_file.FILE).items() if ".lora_A." in name}
    assert ranks == {2, 3, 5}  # of the loaded one alone, of ours alone, of both
    made = outputs(policy)
    again = models.load(Model(base=str(SOURCE), dtype="fp32", start_from=str(tmp_path / "both")), trainable=False)
    assert_same(outputs(again), made, tolerance=2e-5)
    pipeline = StableDiffusionPipeline.from_pretrained(SOURCE, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path / "both")
    x_t, embeds = torch.randn(1, *policy.latent_shape), policy.encode(["a cat"]).parts["embeds"][:1]
    with torch.no_grad():
        theirs, ours = (unet(x_t, 500, encoder_hidden_states=embeds).sample for unet in (pipeline.unet, policy.family.network))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_run_of_version_0_1_goes_on_as_it_began(trained, expected):
    """There the loaded weights themselves trained, and the reference was the base model."""
    old = load(SOURCE)
    old.load_state_dict({name: tensor + 0.05 for name, tensor in old.state_dict().items()})
    policy = load(SOURCE, start_from=str(trained[1]))
    policy.load_state_dict(old.state_dict())
    assert_same(outputs(policy), outputs(old))
    kept = policy.state_dict()
    assert list(kept) == list(old.state_dict()) and all(torch.equal(tensor, kept[name]) for name, tensor in old.state_dict().items())
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        transition = policy.transition(x_t, torch.tensor([0, 3]), policy.encode(["a cat", "a dog"]), torch.tensor([0, 1]), 5.0, reference=True)
    torch.testing.assert_close(transition.mean, expected["mean"])


def test_a_lora_is_no_start_for_the_whole_unet(trained):
    with pytest.raises(RequestError, match=r"holds a LoRA of rank 2, the preset trains the whole UNet. Use --set model.lora_rank=2"):
        load(SOURCE, start_from=str(trained[1]), lora_rank=0)


@pytest.mark.slow
def test_a_whole_unet_is_saved_and_started_from(tmp_path):
    policy = load(SOURCE, lora_rank=0)
    with torch.no_grad():
        policy.trainable["conv_out.bias"].add_(0.5)
    policy.save(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    again = load(SOURCE, start_from=str(tmp_path), lora_rank=0)
    assert_same(outputs(again), outputs(policy))
    with pytest.raises(RequestError, match=r"holds a whole UNet.*Use --set model.lora_rank=0"):
        load(SOURCE, start_from=str(tmp_path), lora_rank=2)


def test_start_from_nothing_is_one_message(tmp_path):
    with pytest.raises(RequestError, match="no such file or folder to start from"):
        load(SOURCE, start_from=str(tmp_path / "nothing"))
    with pytest.raises(RequestError, match="no LoRA weights there"):
        load(SOURCE, start_from=str(tmp_path))


def test_a_lora_of_another_model_is_one_message(trained, tmp_path):
    tensors = load_file(trained[1] / lora_file.FILE)
    save_file({name: torch.zeros(t.shape[0] + 3, t.shape[1] + 3) for name, t in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="do not fit the base model"):
        load(SOURCE, start_from=str(tmp_path / "other.safetensors"))


def test_a_damaged_lora_is_one_message(trained, tmp_path):
    shutil.copy(trained[1] / lora_file.FILE, tmp_path / lora_file.FILE)
    truncate(tmp_path / lora_file.FILE)
    with pytest.raises(RequestError, match="not a readable safetensors file"):
        load(SOURCE, start_from=str(tmp_path))


@pytest.mark.slow
def test_a_file_without_unet_lora_is_one_message(tmp_path):
    save_file({"text_model.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="x.safetensors"):
        load(SOURCE, start_from=str(tmp_path / "x.safetensors"))


def test_several_loras_in_a_folder_must_be_told_apart(trained, tmp_path):
    for name in ("a", "b"):
        shutil.copy(trained[1] / lora_file.FILE, tmp_path / f"{name}.safetensors")
    with pytest.raises(RequestError, match="several LoRA files there"):
        load(SOURCE, start_from=str(tmp_path))
