"""model.quantise: what is refused and why, what is quantised, and a run on int8 weights where torchao is installed."""

import importlib.util
import sys

import pytest
import torch
from flow_models import SD3
from helpers import tdpo
from tiny import preset as tiny_preset

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Model
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import memory, published, sharding
from tdpo_cli.machine.networks import networks
from tdpo_cli.machine.world import World
from tdpo_cli.models import loading, quantise
from tdpo_cli.randomness import Randomness

SMALL_FLOW = {
    "model__base": str(SD3), "model__resolution": 32, "rollout__steps": 3, "rollout__guidance_scale": 2.0, "algorithm__name": "ddpo",
    "run__epochs": 2,
}  # fmt: skip


# --- refused, with the reason ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.lora_rank": 0}, "model.quantise int8 freezes the network, and model.lora_rank 0 trains all of it. Train a LoRA"),
        ({"model.lora_rank": 0, "update.kl_coef": 0.1}, r"update.kl_coef 0.1 needs it too: the base without its LoRA is the reference"),
        ({"run.shard": "on"}, "run.shard on splits the weights that model.quantise int8 packs"),
    ],
)
def test_a_quantised_base_needs_a_lora_and_is_not_sharded(changes, message):
    presets.override(presets.Preset(), [("model.quantise", "int8")])
    with pytest.raises(presets.SettingError, match=message):
        presets.override(presets.Preset(), [("model.quantise", "int8"), *changes.items()])


def test_sharding_by_itself_refuses_a_quantised_network():
    preset = presets.override(presets.Preset(), [("model.quantise", "nf4")])
    with pytest.raises(RequestError, match=r"too large for one card: packed weights \(model.quantise nf4\) cannot be split. Use run.shard=off"):
        sharding.check(preset, World(size=2), "too large for one card")


@pytest.mark.parametrize(("kind", "package"), quantise.PACKAGES.items())
def test_a_missing_package_is_named_before_anything_is_written(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    run = tmp_path / "run"
    arguments = ["train", "--preset", tiny_preset(tmp_path), "--set", f"model.quantise={kind}", "--out", run]
    refused = tdpo(*arguments)
    assert refused.status == 2 and f"model.quantise {kind} needs {package}: pip install 'tdpo[{kind}]'" in " ".join(refused.err.split())
    assert not run.exists()
    assert tdpo(*arguments, "--dry-run").status == 0  # which may be for another machine


def test_nf4_on_a_cpu_is_refused():
    with pytest.raises(RequestError, match="model.quantise nf4 needs a CUDA device"):
        quantise.check("nf4", "cpu")
    with pytest.raises(RequestError, match="model.quantise nf4 needs a CUDA device"):
        loading.load(Model(base="sandbox", quantise="nf4"))


# --- what is quantised, and how many bytes that saves ---------------------------------------------------------------------
def test_the_denoiser_and_t5_are_quantised_and_no_clip(monkeypatch):
    asked = []
    monkeypatch.setattr(quantise, "check", lambda *_: None)
    monkeypatch.setattr(quantise, "options", lambda kind, cls, dtype: asked.append((kind, cls.__name__, dtype)) or {})
    loading.load(Model(base=str(SD3), quantise="int8", lora_rank=2), randomness=Randomness(0))
    assert sorted(asked) == [("int8", "SD3Transformer2DModel", torch.float32), ("int8", "T5EncoderModel", torch.float32)]


def test_the_convolutions_of_unets_are_counted():
    """They keep their precision. Those at both ends, which take and make latents, are not counted."""
    from diffusers import UNet2DConditionModel

    xl = {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}  # fmt: skip
    for name, config in {"pickscore": {**published.SD1_UNET, "cross_attention_dim": 768}, "sdxl-pickscore": {**published.SDXL_UNET, **xl}}.items():
        with torch.device("meta"):
            network = UNet2DConditionModel(**config)
        weights = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 4)
        assert networks(presets.load(name)).convolutions == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("kind", quantise.PACKAGES)
def test_the_prediction_counts_quantised_weights(kind):
    flux = [("model.base", "black-forest-labs/FLUX.1-dev"), ("model.dtype", "bf16"), ("rollout.dynamics", "flow-sde")]
    plain, small = (presets.override(presets.Preset(), [*flux, ("model.quantise", value)]) for value in (None, kind))
    weights, phases = networks(plain).parameters, [memory.phases(one) for one in (plain, small)]
    saved = {name: large - phases[1][name] for name, large in phases[0].items()}
    less = 2 - {"nf4": 0.5625, "int8": 1}[kind]
    assert saved["training"] == pytest.approx(weights["transformer"] * less, rel=1e-6)
    # text encoders leave the device before; in 4 bits the transformer is there already
    expected = weights["text_encoder_2"] * less if kind == "int8" else None
    assert expected is None or saved["encoding"] == pytest.approx(expected, rel=1e-6)


# --- int8 on a CPU ----------------------------------------------------------------------------------------------------------
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'tdpo[int8]'")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'tdpo[nf4]'")


def image(policy):
    shown, texts, row = policy.scheduled(4, 0.0), policy.encode(["a red circle"]), torch.zeros(1, dtype=torch.long)
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        x = shown.transition(x, row + step, texts, row, 1.0).mean
    return policy.decode(x)


@needs_torchao
@pytest.mark.slow  # torchao takes 10 s to import
@pytest.mark.parametrize("base", [str(SD3), "sandbox"])
def test_int8_images_are_close_to_fp32(base):
    with torch.inference_mode():
        plain, small = (image(loading.load(Model(base=base, quantise=kind), trainable=False)) for kind in (None, "int8"))
    distance = float((plain - small).abs().mean() / plain.std())
    assert 0 < distance < 0.05  # 8 bits keep a weight within 0.4 % of the largest of its row


@needs_torchao
@pytest.mark.slow
def test_int8_trains_a_lora_that_the_unquantised_base_loads(tmp_path):
    run, file = tmp_path / "run", tiny_preset(tmp_path, model__quantise="int8", **SMALL_FLOW)
    trained = tdpo("train", "--preset", file, "--out", run, "--quiet")
    assert trained.status == 0, trained.err
    last = sorted((run / "checkpoints").iterdir())[-1]
    policies = [
        loading.load(Model(base=str(SD3), resolution=(32, 32), quantise=kind, start_from=str(last)), trainable=False) for kind in (None, "int8")
    ]
    loaded = [{name: p for name, p in policy.family.network.named_parameters() if "lora_" in name} for policy in policies]
    assert loaded[0].keys() == loaded[1].keys() and all(p.dtype == torch.float32 for p in loaded[1].values())
    assert all(torch.equal(p, loaded[1][name]) for name, p in loaded[0].items())
    assert any(bool((p != 0).any()) for name, p in loaded[0].items() if "lora_B" in name)  # it trained


@needs_torchao
@pytest.mark.slow
def test_int8_weights_take_a_byte_each():
    whole, small = (loading.load(Model(base="sandbox", quantise=kind, lora_rank=0), trainable=False).family.network for kind in (None, "int8"))
    layers = [module.weight for module in whole.modules() if isinstance(module, torch.nn.Linear)]
    linear, rows = sum(weight.numel() for weight in layers), sum(len(weight) for weight in layers)
    # 4 bytes become 1, and each row gets its scale and zero point
    saved = sharding.weight_bytes(whole) - sharding.weight_bytes(small)
    assert saved == pytest.approx(3 * linear, abs=8 * rows)


@needs_bitsandbytes
@pytest.mark.slow  # bitsandbytes takes 20 s to import
def test_nf4_is_what_both_libraries_are_asked_for():
    from diffusers import SD3Transformer2DModel
    from transformers import T5EncoderModel

    for cls in (SD3Transformer2DModel, T5EncoderModel):
        config = quantise.options("nf4", cls, torch.bfloat16)["quantization_config"]
        assert type(config).__module__.startswith("diffusers" if cls is SD3Transformer2DModel else "transformers")
        assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)


@needs_bitsandbytes
@pytest.mark.slow
def test_nf4_samples_and_gives_gradients(monkeypatch):
    """By bitsandbytes' CPU kernels, past diffusers' check for a GPU."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(quantise, "check", lambda *_: None)
    plain, small = (loading.load(Model(base=str(SD3), quantise=kind, lora_rank=2), randomness=Randomness(0)) for kind in (None, "nf4"))
    for network in (small.family.network, small.family.pipeline.text_encoder_3):
        assert "Params4bit" in {type(parameter).__name__ for parameter in network.parameters()}
    assert {parameter.dtype for parameter in small.trainable.values()} == {torch.float32}
    with torch.inference_mode():
        pictures = [image(policy) for policy in (plain, small)]
    assert 0 < float((pictures[0] - pictures[1]).abs().mean() / pictures[0].std()) < 0.5
    small.set_schedule(4)
    row = torch.zeros(1, dtype=torch.long)
    small.transition(torch.randn(1, *small.latent_shape), row + 1, small.encode(["a red circle"]), row, 1.0).mean.square().sum().backward()
    assert sum(float(parameter.grad.abs().sum()) for parameter in small.trainable.values()) > 0


@needs_bitsandbytes
@pytest.mark.gpu
def test_nf4_on_a_gpu(tmp_path):
    run, file = tmp_path / "run", tiny_preset(tmp_path, model__quantise="nf4", **SMALL_FLOW)
    trained = tdpo("train", "--preset", file, "--set", "model.dtype=bf16", "--out", run, "--quiet")
    assert trained.status == 0, trained.err
    last = sorted((run / "checkpoints").iterdir())[-1]
    loading.load(Model(base=str(SD3), resolution=(32, 32), start_from=str(last)), trainable=False)
