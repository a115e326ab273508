"""Published base models that are not on this disk: their networks' configs and the weights of each part. Standard library only.

The weights are counted from diffusers' and transformers' classes with the published configs (tests/unit/machine/test_published.py).
"""

from __future__ import annotations

SD1_PARAMETERS = {"unet": 860e6, "vae": 84e6, "text_encoder": 123e6}
SD1_UNET = {
    "sample_size": 64, "in_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD1_VAE = {"block_out_channels": (128, 256, 512, 512)}
# Stable Diffusion XL
SDXL_PARAMETERS = {"unet": 2567.5e6, "vae": 83.7e6, "text_encoder": 123.1e6, "text_encoder_2": 694.7e6}
SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
}  # fmt: skip
SDXL_VAE = {**SD1_VAE, "force_upcast": True}
SDXL_ADAPTER_PER_RANK = 1_451_520  # LoRA parameters per rank
# flow transformers, by what their hub ids contain; the first that fits
SD3_PARTS = {"vae": 83.8e6, "text_encoder": 123.7e6, "text_encoder_2": 694.7e6, "text_encoder_3": 4.762e9}
SD3 = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "in_channels": 16, "patch_size": 2, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "patch_size": 1, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "guidance_embeds": True,
}  # fmt: skip
QWEN3_4B = 4.0225e9
KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "in_channels": 128, "patch_size": 1, "num_layers": 5, "num_single_layers": 20,
    "attention_head_dim": 128, "num_attention_heads": 24,
}  # fmt: skip
KLEIN_4B = (KLEIN, {"vae": 84.0e6, "text_encoder": QWEN3_4B, "transformer": 3.8755e9})
KLEIN_9B = (
    {**KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32},
    {"vae": 84.0e6, "text_encoder": 8.1907e9, "transformer": 9.0786e9},
)  # fmt: skip
Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel", "in_channels": 16, "all_patch_size": (2,), "dim": 3840, "n_layers": 30, "n_refiner_layers": 2,
    "n_heads": 30,
}  # fmt: skip
QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel", "in_channels": 64, "patch_size": 2, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24,
}  # fmt: skip
QWEN_VAE = {"block_out_channels": (96, 192, 384, 384), "frames": 3}  # of videos: a picture is padded to three frames
TRANSFORMERS = {
    **{name: KLEIN_4B for name in ("klein-base-4b", "klein-4b")},
    **{name: KLEIN_9B for name in ("klein-base-9b", "klein-9b")},
    "z-image": (Z_IMAGE, {"vae": 83.8e6, "text_encoder": QWEN3_4B, "transformer": 6.1549e9}),
    "qwen-image": (QWEN_IMAGE, {"vae": 126.9e6, "text_encoder": 8.2922e9, "transformer": 20.4304e9}, QWEN_VAE),
    "3.5-large": ({**SD3, "num_layers": 38, "num_attention_heads": 38, "qk_norm": "rms_norm"}, {**SD3_PARTS, "transformer": 8.0518e9}),
    "3.5-medium": ({**SD3, "dual_attention_layers": range(13), "qk_norm": "rms_norm"}, {**SD3_PARTS, "transformer": 2.2401e9}),
    "stable-diffusion-3": (SD3, {**SD3_PARTS, "transformer": 2.0253e9}),
    "flux": (FLUX, {"vae": 83.8e6, "text_encoder": 123.1e6, "text_encoder_2": 4.762e9, "transformer": 11.8992e9}),
}
ADAPTER_PER_RANK = 199_296  # of Stable Diffusion 1.x: 797,184 at rank 4
