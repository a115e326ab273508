"""Facts about memory: the counted sizes are those of the networks, and the ladder's plans fit what they are chosen for."""

import contextlib
import itertools
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import make_preset, tdpo
from tolerances import same_output
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tdpo_cli.config import preset as presets
from tdpo_cli.config.settings import Preset
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import counting, footprint, memory, published
from tdpo_cli.machine.networks import guessed, networks
from tdpo_cli.models import adapter
from tdpo_cli.models.family import Family

NARROW = {**published.SD1_UNET, "block_out_channels": (64, 96, 128, 256), "sample_size": 32}
TOP_ONLY = {
    **NARROW, "down_block_types": ("CrossAttnDownBlock2D",) + ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3 + ("CrossAttnUpBlock2D",),
}  # fmt: skip
UNETS = {"sd1": published.SD1_UNET, "sd1 at 768 pixels": {**published.SD1_UNET, "sample_size": 96}, "narrow": NARROW, "attention above": TOP_ONLY}
UNETS["deep, as SDXL"] = {**published.SDXL_UNET, "sample_size": 64}
VAES = {"sd1": published.SD1_VAE, "small": {"block_out_channels": (16, 32, 64)}}
PARAMETERS = published.SD1_PARAMETERS


class Flash(torch.autograd.Function):
    """Saves what a fused attention saves. (Without numbers torch would write out the whole matrix.)"""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, **options: Flash.apply(query, key, value))


class Alive(TorchDispatchMode):
    """Bytes of the tensors that live at the same time."""

    def __init__(self, network):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(parameter.untyped_storage() for parameter in network.parameters())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, count):
        self.now -= count


def unet(config, dtype):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=config["block_out_channels"][0], attention_head_dim=8, **config)
    return network.to(dtype).requires_grad_(False).eval()


def call(network, config, dtype):
    side = config["sample_size"]
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")
    with contextlib.redirect_stderr(None):
        return network(make(2, 4, side, side), torch.zeros(2, device="meta"), encoder_hidden_states=make(2, 77, config["block_out_channels"][0]))


QUICK = [("narrow", False, torch.float16), ("attention above", True, torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, checkpointing, dtype",
    [
        pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow, id=f"{one[0]}-{'checkpointing' if one[1] else 'all kept'}-{one[2]}")
        for one in itertools.product(UNETS, (False, True), (torch.float32, torch.float16))
    ],
)
def test_what_a_backward_pass_keeps_is_counted(flash, name, checkpointing, dtype):
    config = UNETS[name]
    network = unet(config, dtype)
    adapter.attach(network, 4, Family.lora_targets, torch.Generator())
    if checkpointing:
        network.enable_gradient_checkpointing()
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(network, config, dtype)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2
    nets = counting.counted(config, published.SD1_VAE, PARAMETERS)
    size = dtype.itemsize
    predicted = footprint.backward_bytes(nets, size, checkpointing)
    # while one block is computed again, what it keeps comes on top
    once_more = nets.largest_block * size + nets.largest_cast * (size < 4) if checkpointing else 0
    assert counted * 0.85 < predicted - once_more < counted * 1.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["narrow", *(pytest.param(name, marks=pytest.mark.slow) for name in UNETS if name != "narrow")])
def test_what_a_forward_pass_needs_is_counted(flash, name):
    config = UNETS[name]
    network = unet(config, torch.float16)
    with torch.no_grad(), Alive(network) as alive:
        call(network, config, torch.float16)
    predicted = footprint.forward_bytes(counting.counted(config, published.SD1_VAE, PARAMETERS), 2)
    assert alive.peak / 2 * 0.8 < predicted < alive.peak / 2 * 1.4


@pytest.mark.parametrize("name", VAES)
def test_what_decoding_an_image_needs_is_counted(flash, name):
    from diffusers import AutoencoderKL

    widths = VAES[name]["block_out_channels"]
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        ).half().eval()  # fmt: skip
    with torch.no_grad(), Alive(vae) as alive:
        vae.decode(torch.empty(1, 4, 64, 64, dtype=torch.float16, device="meta"))[0].float()
    nets = counting.counted(published.SD1_UNET, VAES[name], PARAMETERS)
    assert alive.peak * 0.9 < footprint.decode_bytes(nets, 2) < alive.peak * 1.3


def test_the_published_share_of_a_gpu_is_within_the_goals():
    """An eighth of a published preset: 16 GB at micro-batch 4 with the scorers parked, 12 GB at micro-batch 1."""
    preset = presets.load("hpsv2")
    assert memory.estimate(preset, 8, memory.Plan(4, 8, 4, park=True)) < 16e9
    assert memory.estimate(preset, 8, memory.Plan(1, 1, 1, park=True)) < 12e9


def test_a_plan_lower_on_the_ladder_never_needs_much_more():
    preset = presets.load("aesthetic")
    needs = [memory.estimate(preset, 8, plan) for plan in memory.GPU_LADDER]
    assert all(lower <= higher * 1.02 for higher, lower in zip(needs, needs[1:], strict=False))


@pytest.mark.parametrize("limit", [80e9, 40e9, 24e9, 16e9, 12e9])
def test_the_chosen_plan_fits_and_is_the_roomiest(limit):
    preset = presets.load("aesthetic")
    plan = memory.choose(preset, int(limit), 8)
    position = memory.GPU_LADDER.index(plan)
    assert memory.estimate(preset, 8, plan) <= limit
    assert all(memory.estimate(preset, 8, roomier) > limit for roomier in memory.GPU_LADDER[:position])


def test_an_asked_for_micro_batch_stays():
    preset = make_preset(run__micro_batch=3)
    assert {plan.micro_batch for gpu in (True, False) for plan in memory.ladder(preset, gpu)} == {3}


def test_without_a_limit_a_cpu_takes_the_first_plan():
    assert memory.choose(presets.load("quickstart"), memory.limit(presets.load("quickstart"), 10**10, gpu=False), gpu=False) == memory.CPU_LADDER[0]


@pytest.mark.parametrize(
    "text, count", [("12GB", 12e9), ("800 MiB", 800 * 2**20), ("1.5gb", 1.5e9), ("1000000", 1e6), ("auto", None), ("AUTO", None)]
)
def test_sizes_are_read(text, count):
    assert memory.parse(text) == count


@pytest.mark.parametrize("text", ["", "12 apples", "-1GB", "0", "GB", "1e9", "auto12"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RequestError, match="expected a size such as 12GB"):
        memory.parse(text)


def test_a_limit_that_nothing_fits_is_one_line_with_the_least_need(tmp_path):
    outcome = tdpo("train", "--preset", "quickstart", "--memory-limit", "50MB", "--out", tmp_path / "run")
    least = min(memory.estimate(presets.load("quickstart"), 1, plan, gpu=False) for plan in memory.CPU_LADDER)
    assert (outcome.status, outcome.out, len(outcome.err.strip().splitlines())) == (2, "", 1)
    assert outcome.err.startswith("tdpo: 50.0 MB of memory are too little: the smallest plan needs about ") and f"{least / 1e6:.1f} MB" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan_of_a_limit():
    roomy, tight = (
        json.loads(tdpo("train", "--preset", "aesthetic", "--dry-run", "--json", *limit).out) for limit in ((), ("--memory-limit", "14GB"))
    )
    assert tight["peak_memory_bytes"] <= 14e9 < roomy["peak_memory_bytes"] + 14e9
    assert tight["plan"]["park"]
    assert tdpo("train", "--dry-run", "--memory-limit", "1MB").status == 2


def test_a_smaller_plan_ends_somewhere():
    plan, seen = memory.CPU_LADDER[0], []
    while plan := plan.smaller(10):
        seen.append((plan.micro_batch, plan.checkpointing))
    assert seen == [(5, False), (2, False), (1, False), (1, True)]


@pytest.mark.slow
def test_gradients_are_the_same_with_checkpointing():
    from tdpo_cli import models

    grads = []
    for checkpointing in (False, True):
        policy = models.load(Preset().model.__class__(base="sandbox", lora_rank=2, dtype="fp32"))
        policy.set_schedule(4, 1.0)
        policy.cut_up(checkpointing, compile=False)
        x, k = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
        policy.transition(x, k, policy.encode(["a", "b"]), torch.tensor([0, 1]), 3.0).log_prob(x).sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in policy.trainable.values()]))
    assert grads[0].abs().max() > 0 and same_output(*grads)


# --- SDXL ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_published_sizes_of_sdxl_are_those_of_its_unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network = UNet2DConditionModel(
            **published.SDXL_UNET, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], addition_embed_type="text_time",
        addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(published.SDXL_PARAMETERS["unet"], rel=1e-4)
    adapter.attach(network, 4, Family.lora_targets, torch.Generator())
    assert sum(p.numel() for p in adapter.parameters(network).values()) == 4 * published.SDXL_ADAPTER_PER_RANK


def test_a_hub_id_of_sdxl_is_predicted_as_sdxl():
    xl, sd = (networks(presets.load(name)) for name in ("sdxl-pickscore", "pickscore"))
    assert sum(xl.parameters.values()) > 3 * sum(sd.parameters.values())
    assert xl.pixels == 1024**2 and sd.pixels == 512**2
    assert networks(presets.load("sdxl-pickscore-24gb")).pixels == 768**2
    assert not xl.vae_in_fp32 and networks(presets.load("sdxl-pickscore", [("model.vae", None)])).vae_in_fp32


@pytest.mark.parametrize(("name", "gigabytes"), [("sdxl-pickscore", 80), ("sdxl-hpsv2", 80), ("sdxl-pickscore-24gb", 24)])
def test_presets_of_sdxl_are_predicted_to_fit_the_card_that_they_are_for(name, gigabytes):
    preset = presets.load(name)
    plan = memory.choose(preset, memory.limit(preset, gigabytes * 0.98e9, True), 1, True)
    assert memory.estimate(preset, 1, plan, True) < gigabytes * 0.9e9


# --- flow transformers, and what an epoch computes ------------------------------------------------------------------------
SHAPE = dict(attention_head_dim=64, num_attention_heads=4, joint_attention_dim=96, pooled_projection_dim=64)
NORMED = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
SD3_NET = dict(sample_size=64, in_channels=16, out_channels=16, patch_size=2, num_layers=3, caption_projection_dim=256, pos_embed_max_size=96)
FLUX_NET = dict(in_channels=64, patch_size=1, num_layers=2, num_single_layers=3, guidance_embeds=True, axes_dims_rope=(16, 24, 24))
NEWER = dict(attention_head_dim=64, num_attention_heads=4, joint_attention_dim=96)
KLEIN_NET = dict(in_channels=128, num_layers=2, num_single_layers=3, guidance_embeds=False, axes_dims_rope=(16, 16, 16, 16), patch_size=1)
Z_NET = dict(in_channels=16, dim=256, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=96, axes_dims=[16, 24, 24])
QWEN_NET = dict(in_channels=64, num_layers=3, axes_dims_rope=(16, 24, 24), patch_size=2)
FLOW = {
    "SD3": {**SHAPE, **SD3_NET}, "SD3.5": {**SHAPE, **SD3_NET, **NORMED}, "FLUX": {**SHAPE, **FLUX_NET}, "klein": {**NEWER, **KLEIN_NET},
    "Z-Image": Z_NET, "Qwen-Image": {**NEWER, **QWEN_NET},
}  # fmt: skip
CLASSES = {"FLUX": "Flux", "klein": "Flux2", "Z-Image": "ZImage", "Qwen-Image": "QwenImage"}


def flow_network(name, dtype=torch.float32):
    import diffusers

    config, kind = FLOW[name], f"{CLASSES.get(name, 'SD3')}Transformer2DModel"
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**config)
    return network.to(dtype).requires_grad_(False).eval(), {**config, "_class_name": kind, "sample_size": 64}


def flow_call(network, dtype=torch.float32):
    """Two images of 64 x 64 latents, with as many tokens of text as the family gives."""
    make = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")
    kind = type(network).__name__
    texts = make(2, counting.TEXT_TOKENS.get(kind, 512), 96)
    if kind.startswith("ZImage"):
        return network([make(16, 1, 64, 64)] * 2, make(2), list(texts), return_dict=False)
    common = {"timestep": make(2), "return_dict": False}
    if kind.startswith("Qwen"):
        shapes = [[(1, 32, 32)]] * 2
        return network(hidden_states=make(2, 1024, 64), encoder_hidden_states=texts, encoder_hidden_states_mask=None, img_shapes=shapes, **common)
    if kind.startswith("Flux2"):
        ids = {"txt_ids": make(2, 512, 4), "img_ids": make(2, 1024, 4)}
        return network(hidden_states=make(2, 1024, 128), encoder_hidden_states=texts, guidance=None, **ids, **common)
    common["pooled_projections"] = make(2, 64)
    if kind.startswith("Flux"):
        return network(
            hidden_states=make(2, 1024, 64), encoder_hidden_states=texts, txt_ids=make(texts.shape[1], 3), img_ids=make(1024, 3),
            guidance=make(2), **common,
        )  # fmt: skip
    return network(make(2, 16, 64, 64), encoder_hidden_states=texts, **common)


def lora_targets(name):
    from tdpo_cli.models.families import flux, qwen_image, sd3

    if name == "klein":
        ends = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(KLEIN_NET["num_single_layers"])]
        return (*Family.lora_targets, "to_qkv_mlp_proj", *ends)
    known = {"FLUX": flux.Flux, "Z-Image": Family, "Qwen-Image": qwen_image.QwenImage}
    return known.get(name, sd3.StableDiffusion3).lora_targets


@pytest.mark.parametrize(
    "name, checkpointing, dtype",
    [
        pytest.param(*one, marks=[] if one == ("FLUX", False, torch.bfloat16) else pytest.mark.slow)
        for one in itertools.product(FLOW, (False, True), (torch.float32, torch.bfloat16))
    ],
)
def test_what_a_flow_transformer_keeps_is_counted(flash, name, checkpointing, dtype):
    network, config = flow_network(name, dtype)
    adapter.attach(network, 4, lora_targets(name), torch.Generator())
    if checkpointing:
        network.enable_gradient_checkpointing()
    own, kept = {parameter.untyped_storage()._cdata for parameter in network.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow_call(network, dtype)
    nets = counting.counted_transformer(config, published.SD1_VAE, {"transformer": 1e9})
    once_more = nets.largest_block * dtype.itemsize + nets.largest_cast * (dtype.itemsize < 4) if checkpointing else 0
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2
    assert counted * 0.75 < footprint.backward_bytes(nets, dtype.itemsize, checkpointing) - once_more < counted * 1.25
    assert sum(p.numel() for p in adapter.parameters(network).values()) == 4 * nets.adapter_per_rank


@pytest.mark.parametrize("name", ["FLUX", *(pytest.param(name, marks=pytest.mark.slow) for name in FLOW if name != "FLUX")])
def test_what_a_flow_transformers_call_needs_is_counted(flash, name):
    network, config = flow_network(name, torch.bfloat16)
    with torch.no_grad(), Alive(network) as alive:
        flow_call(network, torch.bfloat16)
    nets = counting.counted_transformer(config, published.SD1_VAE, {"transformer": 1e9})
    assert alive.peak / 2 * 0.8 < footprint.forward_bytes(nets, 2) < alive.peak / 2 * 1.4


@pytest.mark.parametrize("name", [*FLOW, "narrow", pytest.param("deep, as SDXL", marks=pytest.mark.slow)])
def test_what_a_call_computes_is_counted(name):
    from torch.utils.flop_counter import FlopCounterMode

    network, config = flow_network(name) if name in FLOW else (unet(UNETS[name], torch.float32), UNETS[name])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow_call(network) if name in FLOW else call(network, config, torch.float32)
    count = counting.counted_transformer if name in FLOW else counting.counted
    nets = count(config, published.SD1_VAE, {"unet": 1e9, "transformer": 1e9})
    assert nets.forward_flops == pytest.approx(counter.get_total_flops() / 2, rel=0.06)


def test_what_a_decode_computes_is_counted():
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    widths = VAES["small"]["block_out_channels"]
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        )  # fmt: skip
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, 4, 64, 64))
    nets = counting.counted({**published.SD1_UNET, "sample_size": 64}, VAES["small"], PARAMETERS)
    assert nets.decode_flops == pytest.approx(counter.get_total_flops(), rel=0.06)


PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": 11.9, "stabilityai/stable-diffusion-3.5-large": 8.05, "black-forest-labs/FLUX.2-klein-base-4B": 3.88,
    "Tongyi-MAI/Z-Image": 6.15, "Qwen/Qwen-Image": 20.4,
}  # fmt: skip


@pytest.mark.parametrize(("base", "billions"), PUBLISHED.items())
def test_a_hub_id_of_a_flow_model_is_predicted_as_itself(base, billions):
    preset = make_preset(model__base=base)
    nets = networks(preset)
    assert not guessed(preset) and guessed(make_preset(model__base="black-forest-labs/FLUX.2-dev"))
    assert nets.parameters["transformer"] == pytest.approx(billions * 1e9, rel=0.01) and nets.pixels == 1024**2
    assert nets.guides_by_input == ("FLUX.1" in base)


def test_a_folder_is_predicted_by_its_own_parts(tmp_path):
    """Torch is not needed for it: weights are counted from the headers of their files, whatever precision they are in."""
    from safetensors.torch import save_file

    network, config = flow_network("SD3.5")
    folder = tmp_path / "model"
    for part, content, tensors in (
        ("transformer", {**config, "sample_size": 64}, {"a": torch.zeros(100, 7), "b": torch.zeros(30)}),
        ("vae", {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1}, {"a": torch.zeros(50, dtype=torch.float16)}),
        ("text_encoder_3", {}, {"a": torch.zeros(9)}),
    ):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(content))
        save_file(tensors, folder / part / "model.safetensors")
        save_file({"a": torch.zeros(999)}, folder / part / "model.fp16.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    nets = networks(make_preset(model__base=str(folder), model__resolution=[512, 256]))
    assert nets.parameters == {"transformer": 730, "vae": 50, "text_encoder_3": 9}
    assert (nets.pixels, nets.latent_elements) == (512 * 256, 16 * 64 * 32)
    assert "text_encoder_3" not in networks(make_preset(model__base=str(folder), model__drop_t5=True)).parameters


def test_a_moving_average_is_counted():
    plain, averaged = (make_preset(model__base="CompVis/stable-diffusion-v1-4", update__ema_decay=decay) for decay in (0.0, 0.9))
    nets = networks(plain)
    more = footprint.weight_bytes(averaged, nets, 2) - footprint.weight_bytes(plain, nets, 2)
    assert more == 4 * published.ADAPTER_PER_RANK * averaged.model.lora_rank


# --- what cards hold --------------------------------------------------------------------------------------------------------
def test_a_card_holds_the_roomiest_plan_that_fits():
    preset = presets.load("flux-grpo-pickscore")
    found = memory.cards(preset)
    assert [int(card) for card in found] == [16, 24, 48, 80]
    for card, one in found.items():
        room = 0.9 * int(card) * 2**30
        plans = [plan for plan in memory.GPU_LADDER if memory.estimate(preset, 1, plan) <= room]
        assert one["plan"] == (plans[0].as_dict() if plans else None)
        assert one["least_memory_bytes"] == min(memory.estimate(preset, 1, plan) for plan in memory.GPU_LADDER)
    assert found["80"]["plan"] and not found["24"]["plan"]
    # where no plan fits, the way to quantise that makes one fit
    small = presets.load("flux-grpo-pickscore", [("model.quantise", found["24"]["quantise"])])
    assert memory.cards(small)["24"]["plan"] and memory.cards(small)["24"]["quantise"] is None
    assert "holds it with model.quantise=" in dict(memory.card_lines(found))["24 GB card"]


def test_text_encoders_of_flow_models_leave_before_the_denoiser_comes():
    preset = presets.load("z-image-grpo-pickscore")
    plan, weights = memory.Plan(1, 1, 1, checkpointing=True, park=True, offload=True), networks(preset).parameters
    kept, encoded = (memory.phases(presets.override(preset, [("run.cache_limit", limit)]), 1, plan) for limit in ("20GB", "none"))
    assert kept["training"] == encoded["training"] < 2 * sum(weights.values())
    assert encoded["encoding"] - kept["encoding"] > 2 * weights["transformer"]
    assert kept["encoding"] > 2 * weights["text_encoder"]


@pytest.mark.parametrize("name", ["quickstart", "qwen-image-grpo-pickscore"])
def test_a_dry_run_fits_80_columns_and_gives_no_time_without_a_rate(name):
    shown = tdpo("train", "--preset", name, "--dry-run").err
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert (" at 200 TFLOP/s" in shown) == ("80 GB card" in shown) == (name != "quickstart")
    facts = json.loads(tdpo("train", "--preset", name, "--dry-run", "--json").out)
    assert facts["cards"] == ({} if name == "quickstart" else memory.cards(presets.load(name)))
