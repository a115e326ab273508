"""How many bytes a run holds at a time, and how much it computes. Standard library only: `--dry-run` imports no torch.

All of it is prediction, from what `counting` counts in the networks that `networks` finds.
"""

from __future__ import annotations

from tdpo_cli.config.settings import Preset
from tdpo_cli.machine.counting import Networks
from tdpo_cli.machine.networks import networks

GiB = 1024**3
SCORER_BYTES = {"aesthetic": 1.71e9, "pickscore": 3.94e9, "hpsv2": 3.94e9, "hpsv2.1": 3.94e9, "imagereward": 1.79e9}  # fp32
SCORER_IMAGE_BYTES = 25e6  # activations of one image in a ViT-L or ViT-H, fp32
CRITIC_BYTES = 4 * 4 * 1.2e6  # weights, gradients and Adam's two moments
LIBRARIES = 0.83 * GiB  # a process with its libraries loaded, before any network (docs/performance.md)
CPU_COPIES = 2.0  # on a CPU: oneDNN's reordered copies and the allocator's gaps, measured there too
# of a quantised weight, by model.quantise; nf4 adds a number in fp32 for every 64
QUANTISED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
LARGE_TEXT = 1e9  # weights of a text encoder that is quantised too: T5 and Qwen have more, CLIP has fewer
CUDA_CONTEXT = 0.6 * GiB  # kernels and the libraries' workspaces on a GPU


# --- one call ---------------------------------------------------------------------------------------------------------
def backward_bytes(nets: Networks, size: int, checkpointing: bool) -> float:
    """What one image's call of the denoiser keeps for its backward pass, without guidance; `size` bytes per number."""
    half = size < 4
    if not checkpointing:
        return nets.kept * size + nets.kept_cast * half
    return (nets.kept_checkpointed + nets.largest_block) * size + nets.largest_cast * half  # one block is computed again at a time


def forward_bytes(nets: Networks, size: int) -> float:
    """Alive at the peak of one image's call of the denoiser that keeps nothing."""
    return nets.forward * size


def decode_bytes(nets: Networks, size: int) -> float:
    """Alive at the peak of decoding one image: three maps of the last level's input width at full resolution, and the picture."""
    return nets.pixels * (3 * nets.vae_channels * (4 if nets.vae_in_fp32 else size) + 2 * 3 * 4)


def trajectory_bytes(preset: Preset, nets: Networks, processes: int) -> float:
    """Of this process' samples every latent in fp32 and a critic's embedding per step; of the others' the embeddings, and latents that visit."""
    every, columns, width = preset.rollout.samples_per_epoch, preset.stochastic_steps, 64 if nets.embedded else 1024
    own = -(-every // processes)
    travel = processes > 1 and (preset.update.inner_epochs > 1 or preset.update.batch_size % processes > 0)
    latents = own * (1 + travel) * (columns + 1) * nets.latent_elements * 4
    embeds = (own + every * (processes > 1)) * columns * (width + preset.critic_beside) * 4 * preset.has_critic
    return latents + embeds


def clean_bytes(preset: Preset, nets: Networks, processes: int) -> float:
    """Of this process' samples the clean image predicted at every trained step, in fp32, until the critic has seen it."""
    own = -(-preset.rollout.samples_per_epoch // processes)
    return own * preset.stochastic_steps * nets.latent_elements * 4 * (preset.has_critic and preset.critic_beside)


def scorer_bytes(preset: Preset, nets: Networks) -> float:
    return 4 * sum(nets.parameters.values()) if nets.embedded else sum(SCORER_BYTES.get(name, 0) for name in preset.rewards)


def largest_scorers(preset: Preset, nets: Networks) -> tuple[float, float]:
    """(the critic's encoder, the largest reward), where one at a time is on the device."""
    if nets.embedded:
        return scorer_bytes(preset, nets), scorer_bytes(preset, nets)
    eye = preset.reward.train if preset.reward.train in ("pickscore", "hpsv2", "hpsv2.1") else "aesthetic"
    return SCORER_BYTES[eye] * preset.has_critic, max(SCORER_BYTES.get(name, 0) for name in preset.rewards)


def weight_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """Networks, and fp32 weights that train with their gradients, Adam's two moments and a moving average where there is one."""
    whole, denoiser = sum(nets.parameters.values()), nets.parameters[nets.denoiser]
    each = 16 + 4 * (preset.update.ema_decay > 0)
    if preset.model.lora_rank == 0:
        reference = denoiser * size if preset.needs_reference else 0
        return (whole - denoiser) * size + denoiser * each + reference + CRITIC_BYTES
    return whole * size - saved_bytes(preset, nets, size) + nets.adapter_per_rank * preset.model.lora_rank * each + CRITIC_BYTES


def saved_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """What model.quantise saves: of the denoiser's linear layers, and of large text encoders, whose embeddings are counted with them."""
    return _saved(preset, size, max(0.0, nets.parameters[nets.denoiser] - nets.convolutions) + sum(_texts(nets, LARGE_TEXT)))


def _saved(preset: Preset, size: int, weights: float) -> float:
    return 0.0 if preset.model.quantise is None else weights * (size - QUANTISED_BYTES[preset.model.quantise])


def _texts(nets: Networks, least: float = 0.0) -> list[float]:
    """The weights of each text encoder that has more than so many."""
    return [count for name, count in nets.parameters.items() if name.startswith("text_encoder") and count > least]


def leaving_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """Text encoders that leave a GPU once prompts are encoded: those of the flow families."""
    if nets.denoiser != "transformer":
        return 0.0
    return sum(_texts(nets)) * size - _saved(preset, size, sum(_texts(nets, LARGE_TEXT)))


def encoding_bytes(preset: Preset, nets: Networks, size: int) -> float:
    """Weights on a GPU while text encoders compute there; the denoiser comes later where embeddings are kept, and is there before in 4 bits."""
    whole = weight_bytes(preset, nets, size)
    if preset.run.cache_limit == "none" or preset.model.quantise == "nf4":
        return whole
    return leaving_bytes(preset, nets, size) + nets.parameters.get("vae", 0.0) * size


# --- one epoch ----------------------------------------------------------------------------------------------------------
def epoch_flops(preset: Preset) -> float:
    """Floating-point operations of an epoch: denoiser and VAE. The text encoders and rewards are small beside them and not counted."""
    nets, samples = networks(preset), preset.rollout.samples_per_epoch
    guided = calls(preset, nets)
    # the gradient goes through all products once more, and once again for weights that train
    passes = (3 if preset.model.lora_rank == 0 else 2) * preset.update.inner_epochs * preset.trained_steps
    trained = passes * (guided if preset.update.guidance else 1)
    states = preset.stochastic_steps if preset.has_critic and preset.algorithm.critic_view == "decode" else 0
    return samples * (nets.forward_flops * (preset.rollout.steps * guided + trained) + nets.decode_flops * (states + 1))


def calls(preset: Preset, nets: Networks) -> int:
    """Calls of the denoiser per step: two where classifier-free guidance is on."""
    return 2 if preset.rollout.guidance_scale > 1 and not nets.guides_by_input else 1
