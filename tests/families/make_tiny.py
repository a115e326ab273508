"""Make tiny, randomly initialised text-to-image pipelines in diffusers' on-disk layout, without a network.

    python tests/families/make_tiny.py OUT [--family NAME ...] [--variant 1|2] [--seed N] [--size PIXELS]

writes one `save_pretrained` folder per family and variant, `OUT/<family>-<variant>`: real architectures, file names, tokenizers and
schedules around weights that are noise. The same seed gives the same bytes. Writing needs transformers 5 (its tokenizer constructors).

Variant 1 keeps the published value of what code tends to hard-code (latent channels, VAE scaling and shift, schedule, template) and
shrinks only widths and depths. Variant 2 changes it: what passes on 1 and fails on 2 has found a hard-coded constant.

Traps of the format that these folders contain on purpose:
- sd1-2: v prediction, `sample_size` is (height, width), pads with "!", six latent channels, a VAE of factor 4.
- sdxl: zeros for an absent negative prompt only if `force_zeros_for_empty_prompt`, which sdxl-2 denies. sdxl-2 is fp16 on disk and its VAE
  overflows in half precision.
- sd3-2 has no T5: null parts must be passed to `from_pretrained` as None. CLIP pools at the highest id when its config says
  eos_token_id 2 (as published), else at the first end token.
- flux-2 has no guidance input: only true CFG guides. flux2-klein-2 is distilled: no guidance at all.
- Z-Image's network gives the negative of what its scheduler expects, and its `encode_prompt` writes into the list it is given.
- klein's VAE has no scale or shift but a batch norm, whose mean and variance are buffers. It reads the hidden states 9, 18 and 27, so its
  text encoder has at least 28 layers.
- Qwen-Image drops the first 34 tokens of its template by number, so the tokenizer has to cut that prefix into 34 tokens; its latents
  have a mean and a deviation per channel; its `true_cfg_scale` counts only with a negative prompt.
- transformers 5 saves a CLIPTextModel without the prefix `text_model.`; `restore_names` puts it back, since older versions need it.
"""

import argparse
import functools
import json
import string
from collections import Counter
from pathlib import Path

import diffusers as D
import numpy as np
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers

# ---------------------------------------------------------------------------------------------------------------- tokenizers

CORPUS = """a small red boat on the calm lake at sunrise, an old blue house with a green door and two white windows, a cat and a dog
under the big tree, photo of a man in a black hat, painting of the sea in oil, watercolor of mountains and snow, very detailed,
soft light, long shadows, high quality, low angle, the street of a city at night, rain, three yellow birds in the sky, a cup of tea
on a wooden table, a portrait of a young woman, smiling, a robot with flowers, an empty room, simple drawing, blurry, text"""

SAMPLE = "A portrait of an old man, very detailed; café №7, 東京 🚤"  # what a tokenizer is checked with after writing

THINKING = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + THINKING + "{% endif %}"
)


def learn_merges(words):
    """Byte-pair merges that make one token of every word (a sequence of symbols); ties go to the smaller pair, so no chance is involved."""
    words, merges = set(map(tuple, words)), []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merge(w, best) for w in words}
    return merges


def merge(word, pair):
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def split(cls, text):
    """The words of a text, as the tokenizer class itself cuts it."""
    backend = cls().backend_tokenizer
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def number(*groups):
    return {token: i for i, token in enumerate(dict.fromkeys(token for group in groups for token in group))}


def clip_tokenizer(pad="<|endoftext|>"):
    """CLIP: 256 bytes, the same at a word's end, merges, then start and end as the two highest ids ("!" has id 0)."""
    merges = learn_merges([*w[:-1], w[-1] + "</w>"] for w in split(T.CLIPTokenizer, CORPUS))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = number(letters, [x + "</w>" for x in letters], map("".join, merges), ["<|startoftext|>", "<|endoftext|>"])
    return T.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def t5_tokenizer():
    """T5: a Unigram model whose pieces are single characters and whole words, scored by their frequency; appends </s>, no start token."""
    words = Counter("▁" + w for w in CORPUS.replace(",", " ,").split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)] + [(c, -9.0) for c in string.printable.strip()]
    pieces += [(w, float(np.log(n / words.total()))) for w, n in sorted(words.items())]
    return T.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer(text=CORPUS, extra=("<think>", "</think>")):
    """Qwen: byte-level pairs without an unknown token, a chat template, pads with <|endoftext|> and ends a turn with <|im_end|>."""
    merges = learn_merges(split(T.Qwen2Tokenizer, text + "\nuser\nassistant\nsystem\n"))
    vocab = number(sorted(pre_tokenizers.ByteLevel.alphabet()), map("".join, merges))
    tokenizer = T.Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=4096, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in ("<|im_start|>", *extra)])
    return tokenizer


# ------------------------------------------------------------------------------------------------- text encoders and autoencoders


def clip(tokenizer, width, layers, heads, project=None, act="quick_gelu", legacy_end=True):
    """The published configurations say eos_token_id 2, which makes transformers pool at the highest id instead of at the real one."""
    config = T.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=project or width, hidden_act=act, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2 if legacy_end else tokenizer.eos_token_id,
    )  # fmt: skip
    return (T.CLIPTextModelWithProjection if project else T.CLIPTextModel)(config)


def t5(tokenizer, width, layers, heads):
    return T.T5EncoderModel(T.T5Config(
        vocab_size=len(tokenizer) + 5, d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu"
    ))  # fmt: skip


def qwen3(cls, tokenizer, width, layers, heads, kv_heads, head=8):
    return cls(T.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


PLAIN = dict(use_quant_conv=False, use_post_quant_conv=False)  # the flow families' VAEs have no 1 x 1 convolution beside the latents


def kl_vae(cls, size, widths, latents, **more):
    """Reduces the image 2 ** (len(widths) - 1) times."""
    n = len(widths)
    return cls(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=1, latent_channels=latents, norm_num_groups=4, sample_size=size, **more,
    )  # fmt: skip


def flow(shift, dynamic, **more):
    return D.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic, **more)


# ------------------------------------------------------------------------------------------------------------------- families


def sd1(v, size):
    """1: as Stable Diffusion 1 (PNDM, epsilon). 2: as 2.1 (DDIM, v prediction, OpenCLIP activation), VAE of factor 4, wider than tall."""
    tokenizer = clip_tokenizer() if v == 1 else clip_tokenizer(pad="!")
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1)
    if v == 1:
        vae = kl_vae(D.AutoencoderKL, size, (8, 8, 16, 16), 4, scaling_factor=0.18215)
        unet = D.UNet2DConditionModel(
            sample_size=size // 8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        )  # fmt: skip
        text_encoder, scheduler = clip(tokenizer, 32, 3, 4), D.PNDMScheduler(skip_prk_steps=True, **betas)
    else:
        vae = kl_vae(D.AutoencoderKL, size, (8, 12, 16), 6, scaling_factor=0.31)
        unet = D.UNet2DConditionModel(
            sample_size=(size // 4, size // 2), in_channels=6, out_channels=6, block_out_channels=(8, 16, 24), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1, cross_attention_dim=24,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(1, 2, 3), use_linear_projection=True,
        )  # fmt: skip
        text_encoder = clip(tokenizer, 24, 4, 3, act="gelu", legacy_end=False)
        scheduler = D.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **betas)
    return D.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(v, size):
    """1: Euler, epsilon, zeros for an absent negative prompt. 2: v prediction, no zeros, weights in half precision, a VAE that overflows in it."""
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    a, b, time_dim = (16, 24, 8) if v == 1 else (24, 32, 4)  # widths of the two encoders; each of the six time ids becomes time_dim numbers
    shape = dict(
        cross_attention_dim=a + b, addition_embed_type="text_time", addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=6 * time_dim + b, use_linear_projection=True, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if v == 1:
        vae = kl_vae(D.AutoencoderKL, size, (8, 8, 16, 16), 4, scaling_factor=0.13025, force_upcast=True)
        unet = D.UNet2DConditionModel(
            sample_size=size // 8, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), **shape,
        )  # fmt: skip
        scheduler = D.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **betas)
    else:
        vae = kl_vae(D.AutoencoderKL, size, (8, 12, 16), 8, scaling_factor=0.27, force_upcast=True)
        unet = D.UNet2DConditionModel(
            sample_size=size // 4, in_channels=8, out_channels=8, block_out_channels=(8, 16, 24), attention_head_dim=(1, 2, 3),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 1, 2),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **shape,
        )  # fmt: skip
        scheduler = D.EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction", **betas)
    return D.StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=first, tokenizer_2=second, text_encoder=clip(first, a, 3, 2),
        text_encoder_2=clip(second, b, 4, 4, project=b, act="gelu", legacy_end=v == 1), force_zeros_for_empty_prompt=v == 1,
    )  # fmt: skip


def sd3(v, size):
    """1: as SD 3 (T5, shift 3). 2: as 3.5 (normalised queries and keys, dual-attention blocks), no T5, shift 5, other VAE numbers."""
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    a, b = (16, 24) if v == 1 else (24, 16)  # the two CLIPs, side by side, are padded with zeros to joint_attention_dim, T5's width
    if v == 1:
        third = t5_tokenizer()
        text_encoder_3 = t5(third, 48, 2, 4)
        vae = kl_vae(D.AutoencoderKL, size, (8, 8, 16, 16), 16, scaling_factor=1.5305, shift_factor=0.0609, **PLAIN)
        transformer = D.SD3Transformer2DModel(
            sample_size=size // 8, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=a + b, pos_embed_max_size=24,
        )  # fmt: skip
    else:
        third = text_encoder_3 = None
        vae = kl_vae(D.AutoencoderKL, size, (8, 12, 16), 8, scaling_factor=0.83, shift_factor=-0.21, **PLAIN)
        transformer = D.SD3Transformer2DModel(
            sample_size=size // 4, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=8, num_attention_heads=3, qk_norm="rms_norm",
            joint_attention_dim=56, caption_projection_dim=24, pooled_projection_dim=a + b, pos_embed_max_size=32, dual_attention_layers=(0, 1),
        )  # fmt: skip
    return D.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(3.0 if v == 1 else 5.0, False), vae=vae, tokenizer=first, tokenizer_2=second, tokenizer_3=third,
        text_encoder=clip(first, a, 3, 2, project=a), text_encoder_2=clip(second, b, 4, 4, project=b, act="gelu", legacy_end=v == 1),
        text_encoder_3=text_encoder_3,
    )  # fmt: skip


def flux(v, size):
    """1: as FLUX.1-dev (guidance is an input, shift from the resolution). 2: as schnell (no such input, no shift), other VAE numbers."""
    first, second = clip_tokenizer(), t5_tokenizer()
    if v == 1:
        vae = kl_vae(D.AutoencoderKL, size, (8, 8, 16, 16), 16, scaling_factor=0.3611, shift_factor=0.1159, **PLAIN)
        transformer = D.FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    else:
        vae = kl_vae(D.AutoencoderKL, size, (8, 12, 16), 8, scaling_factor=0.71, shift_factor=-0.17, **PLAIN)
        transformer = D.FluxTransformer2DModel(
            in_channels=32, num_layers=1, num_single_layers=3, attention_head_dim=12, num_attention_heads=3, joint_attention_dim=32,
            pooled_projection_dim=24, guidance_embeds=False, axes_dims_rope=(4, 4, 4),
        )  # fmt: skip
    scheduler = flow(3.0, True, base_shift=0.5, max_shift=1.15) if v == 1 else flow(1.0, False)
    return D.FluxPipeline(
        scheduler=scheduler, vae=vae, transformer=transformer, tokenizer=first, text_encoder=clip(first, 24, 3, 4, legacy_end=v == 1),
        tokenizer_2=second, text_encoder_2=t5(second, 32, 2 * v, 4),
    )  # fmt: skip


def z_image(v, size):
    """1: static shift 3 and Qwen3Model. 2: shift from the resolution and Qwen3ForCausalLM, other widths and VAE numbers."""
    tokenizer = qwen_tokenizer()
    if v == 1:
        vae = kl_vae(D.AutoencoderKL, size, (8, 8, 16, 16), 16, scaling_factor=0.3611, shift_factor=0.1159, **PLAIN)
        transformer = D.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
            axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
        )  # fmt: skip
        text_encoder, scheduler = qwen3(T.Qwen3Model, tokenizer, 24, 4, 4, 2), flow(3.0, False)
    else:
        vae = kl_vae(D.AutoencoderKL, size, (8, 12, 16), 8, scaling_factor=0.71, shift_factor=-0.17, **PLAIN)
        transformer = D.ZImageTransformer2DModel(
            in_channels=8, dim=36, n_layers=3, n_refiner_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=16,
            axes_dims=[4, 4, 4], axes_lens=[1024, 64, 64],
        )  # fmt: skip
        text_encoder, scheduler = qwen3(T.Qwen3ForCausalLM, tokenizer, 16, 3, 2, 1), flow(1.0, True, base_shift=0.4, max_shift=1.3)
    return D.ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)


def flux2_klein(v, size):
    """1: base model (CFG, shift from resolution and step count). 2: distilled (no CFG), static shift, another decoder width."""
    tokenizer = qwen_tokenizer()
    width = 8 if v == 1 else 12  # three hidden states side by side give joint_attention_dim
    if v == 1:
        vae = kl_vae(D.AutoencoderKLFlux2, size, (8, 8, 16, 16), 32)
        transformer = D.Flux2Transformer2DModel(
            in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * width,
            timestep_guidance_channels=64, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        )  # fmt: skip
        text_encoder, scheduler = qwen3(T.Qwen3ForCausalLM, tokenizer, width, 29, 2, 1), flow(3.0, True)
    else:
        vae = kl_vae(D.AutoencoderKLFlux2, size, (8, 12, 16), 6, decoder_block_out_channels=(12, 12, 20), batch_norm_eps=0.05)
        transformer = D.Flux2Transformer2DModel(
            in_channels=24, num_layers=1, num_single_layers=3, attention_head_dim=8, num_attention_heads=3, joint_attention_dim=3 * width,
            timestep_guidance_channels=32, mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        )  # fmt: skip
        text_encoder, scheduler = qwen3(T.Qwen3ForCausalLM, tokenizer, width, 31, 3, 3), flow(2.0, False)
    return D.Flux2KleinPipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, is_distilled=v == 2
    )  # fmt: skip


def qwen_image(v, size):
    """1: 16 latent channels, published means and deviations, shift from the resolution, last sigma 0.02. 2: 6 others, static shift."""
    width, heads, kv_heads, layers = (32, 4, 2, 2) if v == 1 else (24, 3, 3, 3)
    if v == 1:
        vae = D.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
        transformer = D.QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=width,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        scheduler = flow(1.0, True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    else:
        vae = D.AutoencoderKLQwenImage(
            base_dim=6, z_dim=6, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[-0.5, 0.25, 0.75, -0.125, 0.0, 1.0], latents_std=[0.5, 1.5, 2.0, 0.75, 1.25, 3.0],
        )  # fmt: skip
        transformer = D.QwenImageTransformer2DModel(
            in_channels=24, out_channels=6, num_layers=3, attention_head_dim=12, num_attention_heads=3, joint_attention_dim=width,
            axes_dims_rope=(4, 4, 4),
        )  # fmt: skip
        scheduler = flow(2.2, False)
    build = functools.partial(D.QwenImagePipeline, scheduler=scheduler, vae=vae, transformer=transformer)
    draft = build(tokenizer=None, text_encoder=None)  # knows the template, which the tokenizer has to cut into the right number of tokens
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = qwen_tokenizer(CORPUS + draft.prompt_template_encode, vision)
    prefix = tokenizer(draft.prompt_template_encode.split("{}")[0]).input_ids
    assert len(prefix) == draft.prompt_template_encode_start_idx, f"the template's prefix has {len(prefix)} tokens"
    start, end, image, video = tokenizer.convert_tokens_to_ids(vision)
    head = width // heads
    text_encoder = T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.pad_token_id,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[head // 2 - 2, 1, 1]),
        ),
        vision_config=dict(
            depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=width, patch_size=4, window_size=16, fullatt_block_indexes=[0]
        ),
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video, tie_word_embeddings=True,
    ))  # fmt: skip
    return build(tokenizer=tokenizer, text_encoder=text_encoder)


FAMILIES = {
    "sd1": sd1, "sdxl": sdxl, "sd3": sd3, "flux": flux, "z-image": z_image, "flux2-klein": flux2_klein, "qwen-image": qwen_image,
}  # fmt: skip

# model_index.json names tokenizer classes as published; transformers 5 knows both names, older versions need these.
PUBLISHED = {"T5Tokenizer": "T5TokenizerFast"}

# -------------------------------------------------------------------------------------------------------------------- building


@torch.no_grad()
def redraw(model, generator):
    """Weights that keep a signal's size (deviation 1 / sqrt(inputs)), gains near 1, small biases; nothing is left at zero or uninitialised."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("bias"):
            p.copy_(0.1 * noise)
        elif p.numel() == max(p.shape):  # a vector, whatever its shape: the gain of a norm, a token
            p.copy_(1 + 0.1 * noise)
        else:
            p.copy_(noise / (p.numel() / p.shape[0]) ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):  # FLUX.2's VAE keeps its normalisation of latents here
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + 1.5 * torch.rand(buffer.shape, generator=generator))


@torch.no_grad()
def overflow(vae):
    """Scales the last residual block so that its output exceeds 65504 while every weight stays below, as SDXL's VAE does in half precision."""
    vae.decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(1e5)


def restore_names(file):
    """transformers 5 writes a CLIPTextModel without the published prefix; older versions then keep their random weights, with a mere warning."""
    weights = load_file(file)
    if "embeddings.token_embedding.weight" in weights:
        save_file({f"text_model.{name}": tensor for name, tensor in weights.items()}, file, metadata={"format": "pt"})


def build(family, folder, variant=1, seed=0, size=64):
    """Write one pipeline to `folder`."""
    torch.manual_seed(seed)
    pipeline = FAMILIES[family](variant, size)
    generator = torch.Generator().manual_seed(seed)
    for _, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            redraw(part, generator)
    if (family, variant) == ("sdxl", 2):
        overflow(pipeline.vae)
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    restore_names(Path(folder, "text_encoder", "model.safetensors"))
    index = Path(folder, "model_index.json")
    names = json.loads(index.read_text())
    for part, entry in names.items():
        if part.startswith("tokenizer") and entry[1]:
            entry[1], tokenizer = PUBLISHED.get(entry[1], entry[1]), getattr(pipeline, part)
            again = getattr(T, entry[1]).from_pretrained(Path(folder, part))
            text = f"<|im_start|>user\n{SAMPLE}<|im_end|>\n<think>\n"
            assert again(text).input_ids == tokenizer(text).input_ids and again("").input_ids == tokenizer("").input_ids, f"{part} changed on disk"
            if entry[1] in ("CLIPTokenizer", "Qwen2Tokenizer"):
                tokenizer.backend_tokenizer.model.save(str(Path(folder, part)))  # vocab.json and merges.txt, as the published folders have
    index.write_text(json.dumps(names, indent=2) + "\n")
    return Path(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--variant", type=int, choices=(1, 2), help="only this one; both if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels, a multiple of 32")
    args = parser.parse_args()
    if args.size % 32:
        parser.error("--size: a multiple of 32")
    for library in (D.utils.logging, T.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for family in args.family:
        for variant in [args.variant] if args.variant else (1, 2):
            folder = build(family, args.out / f"{family}-{variant}", variant, args.seed, args.size)
            megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
            print(f"{folder.name:14} {megabytes:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
