"""One token for the zeros in T5's place: the same prediction, and the same gradients of an adapter."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from tdpo_cli.models.zero_tokens import merge_zeros

TEXT_TOKENS = 5


def transformer(qk_norm, dual):
    torch.manual_seed(1)
    network = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=4, qk_norm=qk_norm, dual_attention_layers=dual,
    )  # fmt: skip
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "add_k_proj", "add_q_proj", "add_v_proj"]))
    return network


def arguments(zeros):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    texts = torch.nn.functional.pad(draw(3, TEXT_TOKENS, 12), (0, 0, 0, zeros))
    return {
        "hidden_states": draw(3, 4, 4, 4), "encoder_hidden_states": texts, "pooled_projections": draw(3, 6),
        "timestep": torch.tensor([1.0, 500, 999]),
    }  # fmt: skip


def outcome(network, zeros):
    predicted = network(**arguments(zeros)).sample
    weights = {name: weight for name, weight in network.named_parameters() if "lora" in name}
    return predicted.detach(), dict(zip(weights, torch.autograd.grad(predicted.square().sum(), weights.values(), allow_unused=True), strict=True))


@pytest.mark.parametrize("zeros", [0, 1, 77, 256])
@pytest.mark.parametrize("qk_norm, dual", [(None, ()), ("rms_norm", (0, 1))])
def test_merged_zeros_predict_the_same_with_the_same_gradients(qk_norm, dual, zeros):
    plain, merged = transformer(qk_norm, dual), transformer(qk_norm, dual)
    merge_zeros(merged, TEXT_TOKENS)
    wanted, gradients = outcome(plain, zeros)
    predicted, given = outcome(merged, zeros)
    torch.testing.assert_close(predicted, wanted, rtol=1e-4, atol=1e-5)
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients.values()) > 20
    for name, gradient in gradients.items():
        assert (gradient is None) == (given[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(given[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_the_number_of_zeros_counts():
    """Otherwise the test above could not fail."""
    network = transformer("rms_norm", ())
    few, many = (network(**arguments(zeros)).sample for zeros in (1, 256))
    assert (few - many).detach().abs().max() > 1e-2
