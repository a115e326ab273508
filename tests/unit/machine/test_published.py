"""Facts about models that are not on this disk: their weights are those of diffusers' and transformers' classes with the published configs."""

import pytest
import torch

from tdpo_cli.machine import published

OTHERS = {"qwen-image": {"joint_attention_dim": 3584}, "z-image": {"cap_feat_dim": 2560}}


def weights_of(cls, config):
    """Of a class of diffusers, with arguments, or of transformers, with a config object."""
    with torch.device("meta"):
        network = cls(**config) if isinstance(config, dict) else cls(config)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["klein-base-4b", "klein-base-9b", "z-image", "qwen-image"])
def test_weights_of_a_transformer_are_those_of_its_class(name):
    diffusers = pytest.importorskip("diffusers")
    config, weights, *_ = published.TRANSFORMERS[name]
    kind = config["_class_name"]
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    guidance = {"guidance_embeds": False} if "klein" in name else {}
    widths = {"joint_attention_dim": 12288 if "9b" in name else 7680} if "klein" in name else OTHERS[name]
    own = {key: value for key, value in config.items() if key != "_class_name"}
    assert weights_of(getattr(diffusers, kind), own | guidance | widths) == pytest.approx(weights["transformer"], rel=1e-4)


def test_weights_of_text_encoders_are_those_of_their_classes():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    common = dict(vocab_size=151936, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    small = Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **common)
    large = Qwen3Config(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False, **common)
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)
    vision = dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584)
    both = Qwen2_5_VLConfig(text_config=text | {"tie_word_embeddings": False}, vision_config=vision)
    published_as = {name: weights["text_encoder"] for name, (_, weights, *_) in published.TRANSFORMERS.items() if "text_encoder" in weights}
    assert (
        weights_of(Qwen3ForCausalLM, small) == pytest.approx(published_as["z-image"], rel=1e-3)
        and published_as["klein-4b"] == published_as["z-image"]
    )
    assert weights_of(Qwen3ForCausalLM, large) == pytest.approx(published_as["klein-9b"], rel=1e-3)
    assert weights_of(Qwen2_5_VLForConditionalGeneration, both) == pytest.approx(published_as["qwen-image"], rel=1e-3)


def test_weights_of_vaes_are_those_of_their_classes():
    diffusers = pytest.importorskip("diffusers")
    for name, kind in {"klein-4b": "AutoencoderKLFlux2", "qwen-image": "AutoencoderKLQwenImage"}.items():
        if hasattr(diffusers, kind):
            assert weights_of(getattr(diffusers, kind), {}) == pytest.approx(published.TRANSFORMERS[name][1]["vae"], rel=1e-2)
