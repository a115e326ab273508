"""Facts about exported LoRA files: other programs' names, the same numbers, and one clear line where there is no LoRA."""

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from helpers import make_preset, tdpo
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerances import same_output

from tdpo_cli import models
from tdpo_cli.errors import RequestError
from tdpo_cli.models import adapter, kohya, lora_file
from tdpo_cli.models.family import Family
from tdpo_cli.sandbox import ZOO
from tdpo_cli.storage.run_dir import RunDir

RANK = 3
PRESET = make_preset(model__base="sandbox", model__lora_rank=RANK, model__dtype="fp32", run__seed=5, reward__train="gold")


@pytest.fixture(scope="module")
def policy():
    """The sandbox's model with a LoRA that does something."""
    policy = models.load(PRESET.model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=draw)
    return policy


@pytest.fixture(scope="module")
def run(policy, tmp_path_factory):
    """A run folder with checkpoints of two epochs; the earlier one's LoRA is half as strong."""
    folder = RunDir(tmp_path_factory.mktemp("export") / "my-run")
    folder.start(PRESET)

    def halved(path):
        policy.save(path)
        state = load_file(path / lora_file.FILE)
        save_file({name: tensor / 2 if "lora_B" in name else tensor for name, tensor in state.items()}, path / lora_file.FILE)

    folder.save_checkpoint(3, halved, PRESET.digest(), None)
    folder.save_checkpoint(7, policy.save, PRESET.digest(), None)
    return folder.path


@pytest.fixture(scope="module")
def exported(run):
    file = run.parent / "exported.safetensors"
    outcome = tdpo("export", run, "--format", "kohya", "--out", file, "--json")
    assert outcome.status == 0, outcome.err
    return file, json.loads(outcome.out)


def metadata(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def sd1_state(rank=4, width=768):
    """The LoRA of a UNet of full size, without numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=width, attention_head_dim=8)
        adapter.attach(unet, rank, Family.lora_targets, torch.Generator())
    state = get_peft_model_state_dict(unet, adapter_name=adapter.ADAPTER)
    return unet, {f"unet.{name}": tensor for name, tensor in state.items()}


# --- the same numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_diffusers_makes_the_same_images_of_the_exported_file(run, exported):
    def images(lora_weights):
        pipe = StableDiffusionPipeline.from_pretrained(ZOO / "pipeline", torch_dtype=torch.float32, safety_checker=None)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if lora_weights is not None:
            pipe.load_lora_weights(lora_weights)
        noise = torch.Generator().manual_seed(1)
        return pipe(["a red circle on a blue background"] * 2, num_inference_steps=4, guidance_scale=3.0, generator=noise, output_type="np").images

    base, ours, kohyas = images(None), images(run / "checkpoints/epoch_0007"), images(exported[0])
    assert abs(ours - kohyas).max() == 0
    assert abs(ours - base).max() > 0.1


@pytest.mark.slow
def test_up_times_down_added_by_hand_is_the_adapted_network(policy, exported):
    """What the format means to its readers: weight + up @ down * alpha / rank."""
    state = load_file(exported[0])
    plain = models.load(PRESET.model, trainable=False).family.network
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in plain.named_modules()}
    inputs = {
        "sample": torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([700, 20]), "encoder_hidden_states": policy.family.encode(["a red circle", "a blue ring"]).parts["embeds"],
    }  # fmt: skip
    with torch.no_grad():
        untouched = plain(**inputs).sample
        for name in {key.split(".")[0] for key in state}:
            up, down, alpha = (state[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            layers[name].weight += up @ down * (alpha / len(down))
        by_hand, adapted = plain(**inputs).sample, policy.family.network(**inputs).sample
    assert same_output(by_hand, adapted)
    assert (untouched - adapted).abs().max() > 0.1


@pytest.mark.slow
def test_our_own_reader_finds_the_same_weights(policy, exported):
    again = models.load(dataclasses.replace(PRESET.model, start_from=str(exported[0])))
    ours = policy.state_dict()
    loaded = {name.replace(".start.", ".policy."): p for name, p in again.family.network.named_parameters() if ".start." in name}
    assert ours.keys() == loaded.keys()
    assert all(tensor.equal(ours[name]) for name, tensor in loaded.items())


# --- names and metadata -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_at_full_size_the_names_are_the_well_known_ones():
    """Stable Diffusion 1.x has its transformers at down 0-2, mid and up 1-3; a LoRA of rank 4 on their attention is 128 layers."""
    places = [f"down_blocks_{i}_attentions_{j}" for i in (0, 1, 2) for j in (0, 1)] + ["mid_block_attentions_0"]
    places += [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    layers = [f"attn{i}_{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out_0")]
    names = {f"lora_unet_{place}_transformer_blocks_0_{layer}" for place in places for layer in layers}
    converted = kohya.convert(sd1_state()[1])
    assert len(names) == 128
    assert set(converted) == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}


@pytest.mark.slow
def test_at_full_size_every_layer_is_found_by_its_name():
    """As the programs that read the format do it: the module's path with underscores."""
    unet, state = sd1_state()
    shapes = {f"lora_unet_{name.replace('.', '_').replace('_base_layer', '')}": layer.weight.shape for name, layer in unet.named_modules()
              if isinstance(layer, torch.nn.Linear) and "lora_" not in name}  # fmt: skip
    converted = kohya.convert(state)
    for name in {key.split(".")[0] for key in converted}:
        up, down = converted[f"{name}.lora_up.weight"], converted[f"{name}.lora_down.weight"]
        assert (up.shape[1], down.shape[0]) == (4, 4) and converted[f"{name}.alpha"] == 4
        assert (up.shape[0], down.shape[1]) == tuple(shapes[name])


@pytest.mark.slow
@pytest.mark.parametrize("width, version, v2", [(768, "sd_v1", "False"), (1024, "sd_v2", "True")])
def test_the_generation_of_the_base_is_read_off_the_weights(width, version, v2):
    facts = kohya.metadata(sd1_state(rank=8, width=width)[1], "my-lora")
    assert (facts["ss_base_model_version"], facts["ss_v2"]) == (version, v2)
    assert (facts["ss_network_dim"], facts["ss_network_alpha"], facts["ss_output_name"]) == ("8", "8.0", "my-lora")
    assert facts.get("modelspec.architecture") == ("stable-diffusion-v1/lora" if version == "sd_v1" else None)


def test_the_metadata_says_how_the_checkpoint_came_about(exported):
    facts = metadata(exported[0])
    assert facts["ss_network_module"] == "networks.lora" and facts["ss_network_dim"] == str(RANK) and facts["ss_network_alpha"] == f"{RANK}.0"
    assert (facts["ss_output_name"], facts["ss_sd_model_name"], facts["ss_seed"], facts["ss_epoch"]) == ("exported", "sandbox", "5", "8")
    assert facts["ss_training_comment"].endswith("tdpo-r on the reward gold, epoch_0007")
    assert "ss_base_model_version" not in facts  # the sandbox's model is not Stable Diffusion


# --- SDXL ---------------------------------------------------------------------------------------------------------------------
ATTENTION = Family.lora_targets
EVERYTHING = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
              "downsamplers.0.conv", "upsamplers.0.conv")  # fmt: skip


def sdxl(targets, sizes="published"):
    """An SDXL UNet's config and the LoRA of it, without numbers."""
    levels = {
        "published": ((320, 640, 1280), ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), [1, 2, 10], 2),
        "two levels, one layer": ((32, 64), ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D"), [1, 2], 1),
    }[sizes]
    channels, down, up, transformers, layers = levels
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=channels, down_block_types=down, up_block_types=up, transformer_layers_per_block=transformers, layers_per_block=layers,
            cross_attention_dim=2048, attention_head_dim=8, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        adapter.attach(unet, 4, targets, torch.Generator())
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet, adapter_name=adapter.ADAPTER).items()}
    return unet.config, state


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [pytest.param("published", marks=pytest.mark.slow), "two levels, one layer"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_sdxl_names_are_read_back_by_diffusers_own_converter(sizes, targets):
    config, state = sdxl(targets, sizes)
    converted = kohya.convert(state, config.layers_per_block)
    assert all("_blocks_" in name or "middle_block" in name for name in converted) and not any("down_blocks" in name for name in converted)
    back, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(converted), unet_config=config)
    assert len(back) == len(state) and len(alphas) == len(state) // 2 and set(alphas.values()) == {4.0}
    again = convert_unet_state_dict_to_peft({name.removeprefix("unet."): tensor for name, tensor in back.items()})
    assert {name: tensor.shape for name, tensor in again.items()} == {name.removeprefix("unet."): tensor.shape for name, tensor in state.items()}


@pytest.mark.slow
def test_sdxl_names_are_the_well_known_ones():
    """The published SDXL has its transformers at input blocks 4, 5, 7, 8, the middle, and output blocks 0 to 5."""
    converted = kohya.convert(sdxl(ATTENTION)[1], 2)
    places = {name.split("_transformer_blocks_")[0] for name in converted}
    assert places == {f"lora_unet_{place}" for place in (
        "input_blocks_4_1", "input_blocks_5_1", "input_blocks_7_1", "input_blocks_8_1", "middle_block_1", *(f"output_blocks_{i}_1" for i in range(6)),
    )}  # fmt: skip
    assert len(converted) == 3 * 560
    assert converted["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"].shape == (4, 640)


@pytest.mark.slow
def test_sdxl_metadata_names_the_generation():
    facts = kohya.metadata(sdxl(ATTENTION)[1], "my-lora")
    assert (facts["ss_base_model_version"], facts["modelspec.architecture"]) == ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")


def test_other_transformers_are_refused_with_what_works():
    with pytest.raises(RequestError, match=r"this LoRA is another transformer's .* ComfyUI and diffusers read it as it is. .* alpha / rank"):
        kohya.convert({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)})


def test_qwen_image_is_the_same_lora_in_diffusers():
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage", reason="this diffusers has no Qwen-Image").QwenImagePipeline
    from tdpo_cli.models.families.qwen_image import QwenImage

    draw = torch.Generator().manual_seed(0)
    layers = [f"transformer.transformer_blocks.{block}.{layer}" for block in (0, 11) for layer in QwenImage.lora_targets]
    shapes = {"lora_A": (2, 5), "lora_B": (7, 2)}
    state = {f"{layer}.{part}.weight": torch.randn(shape, generator=draw) for layer in layers for part, shape in shapes.items()}
    converted = kohya.convert(state, alpha_of=lambda layer, rank: 6.0)
    assert converted["lora_unet_transformer_blocks_11_attn_to_out_0.lora_down.weight"].equal(state[f"{layers[12 + 3]}.lora_A.weight"])
    back = pipeline.lora_state_dict(converted)
    assert back.keys() == state.keys()
    for layer in layers:
        ours, theirs = (one[f"{layer}.lora_B.weight"] @ one[f"{layer}.lora_A.weight"] for one in (state, back))
        assert (theirs - ours * (6.0 / 2)).abs().max() < 1e-5


@pytest.mark.slow
def test_alpha_of_the_file_is_exported(policy, tmp_path):
    other = models.load(dataclasses.replace(PRESET.model, lora_alpha=6.0))
    other.save(tmp_path / "lora")
    assert tdpo("export", tmp_path / "lora", "--format", "kohya", "--out", tmp_path / "out.safetensors").status == 0
    state = load_file(tmp_path / "out.safetensors")
    assert {float(tensor) for name, tensor in state.items() if name.endswith(".alpha")} == {6.0}
    assert metadata(tmp_path / "out.safetensors")["ss_network_alpha"] == "6.0"


# --- the command ------------------------------------------------------------------------------------------------------------
def test_the_report_counts_layers(exported, policy):
    file, report = exported
    layers = len(policy.trainable) // 2
    assert report == {
        "out": str(file), "format": "kohya", "source": "my-run-epoch_0007", "layers": layers, "rank": RANK, "alpha": float(RANK),
    }  # fmt: skip
    assert len(load_file(file)) == 3 * layers


def test_an_earlier_epoch_is_another_file(run, exported, tmp_path):
    assert tdpo("export", run, "--format", "kohya", "--epoch", 3, "--out", tmp_path / "early.safetensors").status == 0
    early, late = load_file(tmp_path / "early.safetensors"), load_file(exported[0])
    assert all(tensor.equal(early[name] * 2 if "lora_up" in name else early[name]) for name, tensor in late.items())


@pytest.mark.parametrize("which", ["checkpoint folder", "LoRA file"])
def test_a_checkpoint_may_be_named_in_several_ways(which, run, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run / "checkpoints/epoch_0007"
    argument, name = {"checkpoint folder": (folder, "my-run-epoch_0007"), "LoRA file": (folder / lora_file.FILE, "pytorch_lora_weights")}[which]
    assert tdpo("export", argument, "--format", "kohya").status == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f"{name}-kohya.safetensors"
    expected = load_file(exported[0])
    assert all(tensor.equal(expected[key]) for key, tensor in load_file(file).items())
    assert ("ss_epoch" in metadata(file)) == (which == "checkpoint folder")


def refused(*arguments):
    outcome = tdpo("export", *arguments)
    assert (outcome.status, outcome.out) == (2, "") and outcome.err.count("\n") == 1
    return outcome.err.removeprefix("tdpo: ").strip()


def test_what_is_no_lora_is_refused_with_what_to_do(policy, tmp_path):
    assert refused("base", "--format", "kohya") == "base: no LoRA there to export, but a whole model."
    whole = RunDir(tmp_path / "whole")
    whole.start(make_preset(model__base="sandbox", model__lora_rank=0))
    whole.save_checkpoint(0, lambda path: models.load(make_preset(model__lora_rank=0, model__base="sandbox").model).save(path), "", None)
    message = refused(whole.path, "--format", "kohya", "--out", tmp_path / "out.safetensors")
    assert "a whole network was trained, and kohya's format holds LoRAs" in message and "convert_diffusers_to_original_stable_diffusion.py" in message
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_is_never_overwritten(run, exported):
    before = exported[0].read_bytes()
    assert refused(run, "--format", "kohya", "--out", exported[0]) == f"{exported[0]} exists already; choose another --out."
    assert exported[0].read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "a1111"], "--format a1111: unknown format. Known: kohya."),
        (["--format", "kohya", "--out", "out.pt"], "--out out.pt: expected a file that ends in .safetensors."),
        (["--format", "kohya", "--epoch", "9"], "no checkpoint of epoch 9. There are: epoch_0003, epoch_0007."),
        ([], "Missing option '--format'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_message(run, arguments, message):
    assert message in refused(run, *arguments)


def test_an_exported_file_is_not_exported_again(exported, tmp_path):
    message = refused(exported[0], "--format", "kohya", "--out", tmp_path / "out.safetensors")
    assert message.startswith(f"{exported[0]}: these weights are in kohya's format already (lora_unet_")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not a header")
    assert "damaged, not a readable safetensors file" in refused(tmp_path / "bad.safetensors", "--format", "kohya")


def test_a_disk_that_fills_up_leaves_nothing_and_is_no_wrong_request(run, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tdpo_cli.export.export.save_file", full)
    outcome = tdpo("export", run, "--format", "kohya", "--out", tmp_path / "out.safetensors")
    assert outcome.status == 1 and "writing failed: No space left on device" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_the_file_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file/out.safetensors"
    assert refused(run, "--format", "kohya", "--out", out).startswith(f"{out.parent}: cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


A, B = (
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight",
)


@pytest.mark.parametrize(
    "state, message",
    [
        ({A: (4, 8)}, f"one half of a pair of LoRA weights is missing: {A}"),
        ({B: (8, 4)}, f"one half of a pair of LoRA weights is missing: {A}"),
        ({A: (4, 8), B: (8, 4), "text_encoder_3.x.lora_A.weight": (4, 8)}, "found text_encoder_3.x.lora_A.weight"),
        ({}, "no LoRA weights there."),
    ],
    ids=["no up", "no down", "third text encoder", "empty"],
)
def test_weights_that_cannot_be_converted_are_named(state, message):
    with pytest.raises(RequestError, match=message.replace("[", r"\[")):
        kohya.convert({name: torch.zeros(shape) for name, shape in state.items()})
