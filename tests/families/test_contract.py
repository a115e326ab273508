"""The contract of model families: what must hold for every pipeline that the product trains.

    pytest tests/families                                   # tiny pipelines of all supported families, written on the spot
    pytest tests/families --pipelines DIR [--pipelines DIR2]   # your own: a diffusers folder, or a folder that holds some

A pipeline whose class is not supported, or that the installed diffusers lacks, is skipped with that reason. Everything runs in single
precision on the CPU at 64 x 96 pixels, with several copies of the networks in memory: meant for small folders. A new family needs a line
in `conventions.CALLS`, and nothing else.
"""

import re

import pytest
import torch
from subject import GUIDANCE, LEVELS, LONG, NOISE_SEED, OTHER, PROMPTS, SHORT, SIZE, STEPS, levels

from tdpo_cli.errors import RequestError
from tdpo_cli.sampling.generate import denoise
from tdpo_cli.types import Conditioning

ROUNDING = 1e-5  # of a log-probability, or of a prediction relative to its size, in another batch
GUIDANCES = pytest.mark.parametrize("guidance", [1.0, GUIDANCE], ids=["unguided", "guided"])
ENDLESS = "a red boat on the calm lake at sunrise, " * 1000  # longer than any text encoder reads


def normal(policy, count, seed=0):
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def steps(k, count):
    return torch.full((count,), k)


@torch.no_grad()
def means(policy, texts=None, reference=False):
    """The transitions of all steps from fixed states."""
    texts = policy.encode(PROMPTS) if texts is None else texts
    rows, x = torch.arange(len(PROMPTS)), normal(policy, len(PROMPTS))
    return torch.stack([policy.transition(x, steps(k, len(rows)), texts, rows, GUIDANCE, reference).mean for k in range(STEPS)])


# --- log-probabilities --------------------------------------------------------------------------------------------------
class Rollout:
    """Samples with noise, as training draws them: states, log-probabilities, and who had which prompt."""

    def __init__(self, policy, guidance):
        self.policy, self.guidance = policy, guidance
        self.texts, self.rows = policy.encode(PROMPTS), torch.tensor([0, 1, 2, 0])
        self.trained = policy.stochastic.nonzero().flatten().tolist()
        self.states, self.log_probs = [normal(policy, len(self.rows))], []
        with torch.inference_mode():
            noise = lambda k: normal(policy, len(self.rows), seed=10 + k)
            for _, _, transition, after in denoise(policy, self.texts, self.rows, self.states[0], noise, guidance):
                self.states.append(after)
                self.log_probs.append(transition.log_prob(after))
        self.states, self.log_probs = torch.stack(self.states, 1).clone(), torch.stack(self.log_probs, 1).clone()

    def log_ratio(self, samples, k):
        """Of pairs (sample, step), computed in one batch and with gradients, as the update does."""
        samples, k = torch.as_tensor(samples), torch.as_tensor(k)
        transition = self.policy.transition(self.states[samples, k], k, self.texts, self.rows[samples], self.guidance)
        return (transition.log_prob(self.states[samples, k + 1]) - self.log_probs[samples, k]).detach()


@pytest.fixture(scope="module", params=[1.0, GUIDANCE], ids=["unguided", "guided"])
def rollout(case, request):
    return Rollout(case.moved, request.param)


def test_log_ratio_is_zero_in_the_same_batch(rollout):
    assert rollout.trained
    for k in rollout.trained:
        ratio = rollout.log_ratio(range(4), [k] * 4)
        assert ratio.eq(0).all(), (k, ratio)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches", [[[2, 0, 3, 1]], [[0, 1, 2], [3]], [[3], [1], [0], [2]], [[1, 1, 0, 2, 3, 3]]], ids=["permuted", "split", "single rows", "repeated"]
)
def test_log_ratio_is_rounding_in_any_other_batch(rollout, batches):
    for k in rollout.trained:
        for samples in batches:
            ratio = rollout.log_ratio(samples, [k] * len(samples))
            assert ratio.abs().max() <= ROUNDING, (k, samples, ratio)


def test_log_ratio_is_rounding_where_steps_are_mixed(rollout):
    pairs = torch.cartesian_prod(torch.arange(4), torch.tensor(rollout.trained))
    for batch in pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))].split(5):
        ratio = rollout.log_ratio(batch[:, 0], batch[:, 1])
        assert ratio.abs().max() <= ROUNDING, (batch, ratio)


@pytest.mark.slow
def test_log_ratio_moves_with_the_weights(case, rollout):
    """So that the zeros above are no accident of a policy that ignores its adapter."""
    other = Rollout(case.fresh, rollout.guidance)
    other.policy = case.moved
    # the largest: that of one sample can be near 0 by chance
    assert other.log_ratio(range(4), [other.trained[0]] * 4).abs().max() > 4 * ROUNDING


# --- images -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@GUIDANCES
def test_images_without_noise_are_the_pipelines(case, guidance):
    assert levels(case.ours(case.base, guidance), case.theirs(case.plain, guidance)) <= LEVELS


@pytest.mark.slow
def test_noise_is_drawn_in_the_pipelines_shape(case):
    drawn = case.theirs(case.plain, generator=torch.Generator().manual_seed(NOISE_SEED))
    assert levels(drawn, case.plain_images) < 0.1


@pytest.mark.slow
def test_negative_prompt_is_the_pipelines(case):
    if case.base.family.guidance != "cfg" or not case.call.takes_negative:
        pytest.skip("this pipeline takes no negative prompt")
    policy = case.load(trainable=False, negative_prompt=OTHER)
    images = case.ours(policy)
    assert levels(images, case.theirs(case.plain, negative=OTHER)) <= LEVELS
    assert levels(images, case.ours(case.base)) > LEVELS


def test_size_that_nobody_asks_for_is_the_pipelines(case):
    if not case.call.default_size:
        pytest.skip("this pipeline's own size is not a property of the folder")
    policy, pipeline = case.load(trainable=False, resolution=None), case.plain
    latent = torch.zeros(1, *policy.latent_shape)
    theirs = pipeline(SHORT, num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert policy.decode(latent).shape == theirs.shape


def test_decode_gives_pictures_of_the_resolution(case):
    images = case.base.decode(3 * normal(case.base, 2))
    assert images.shape == (2, 3, *SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


def test_decode_in_tiles_gives_pictures(case):
    policy = case.load(trainable=False, vae_tiling=True)
    assert policy.family.pipeline.vae.use_tiling
    images = policy.decode(3 * normal(policy, 2))
    assert images.shape == (2, 3, *SIZE) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


def test_decode_of_a_row_is_that_of_its_batch(case):
    x = normal(case.base, 3)
    assert levels(case.base.decode(x)[1:2], case.base.decode(x[1:2])) < 0.1


def test_resolution_that_does_not_divide_is_refused_with_the_multiple(case):
    with pytest.raises(RequestError, match=r"multiples of \d+") as refusal:
        case.load(trainable=False, resolution=(SIZE[0] + 1, SIZE[1]))
    unit, family = int(re.search(r"multiples of (\d+)", str(refusal.value))[1]), case.base.family
    assert family.shape_of((3 * unit, 4 * unit)) != family.shape_of((4 * unit, 3 * unit))
    for wrong in [(3 * unit, 4 * unit + unit // 2), (3 * unit - 1, 4 * unit)]:
        with pytest.raises(RequestError, match=f"multiples of {unit}"):
            family.shape_of(wrong)


# --- reference and weights ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_reference_is_the_base_model(case):
    base = means(case.base)
    for policy in (case.fresh, case.moved):
        assert means(policy, reference=True).equal(base)
    assert means(case.fresh).equal(base)
    assert not means(case.moved).allclose(base, atol=1e-2)


@pytest.mark.slow
def test_state_dict_carries_the_policy(case):
    policy = case.load()
    assert not means(policy).equal(means(case.moved))
    policy.load_state_dict(case.moved.state_dict())
    assert means(policy).equal(means(case.moved))


def test_state_dict_of_another_rank_is_refused(case):
    state = {name: weight.repeat_interleave(2, 0 if "lora_A" in name else 1) for name, weight in case.moved.state_dict().items()}
    with pytest.raises(RequestError, match="do not fit this model"):
        case.fresh.load_state_dict(state)


def test_lora_of_ours_gives_the_same_images_in_diffusers(case):
    pipeline = case.pipeline()
    pipeline.load_lora_weights(case.own_lora)
    images = case.theirs(pipeline)
    assert levels(case.ours(case.moved), images) <= LEVELS
    assert levels(images, case.plain_images) > 4 * LEVELS


def test_lora_of_ours_is_the_same_bytes_each_time(case, tmp_path):
    """The library orders a file's metadata at random: eight files would agree by chance in 1 of 128 cases."""
    for name in "abcdefgh":
        case.moved.save(tmp_path / name)
    assert len({next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "abcdefgh"}) == 1


@pytest.mark.slow
def test_lora_of_ours_is_sampled_as_it_was_saved(case):
    policy = case.load(trainable=False, start_from=str(case.own_lora))
    assert not policy.trainable
    assert levels(case.ours(policy), case.ours(case.moved)) <= LEVELS


@pytest.mark.slow
def test_lora_of_diffusers_gives_its_images_here(case):
    folder, images = case.foreign
    policy = case.load(trainable=False, start_from=str(folder))
    assert levels(case.ours(policy), images) <= LEVELS
    assert levels(case.plain_images, images) > 4 * LEVELS


@pytest.mark.slow
def test_lora_of_diffusers_keeps_its_strength_through_training(case, tmp_path):
    """Started from, not yet trained, saved again: alpha is not the rank."""
    folder, images = case.foreign
    policy = case.load(start_from=str(folder))
    assert policy.trainable and levels(case.ours(policy), images) <= LEVELS
    policy.save(tmp_path)
    pipeline = case.pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert levels(case.theirs(pipeline), images) <= LEVELS


# --- text ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@GUIDANCES
def test_prompt_alone_predicts_as_in_a_batch_with_longer_ones(case, guidance):
    policy = case.moved
    texts, x = policy.encode([OTHER, LONG, SHORT]), normal(policy, 1)
    for row, prompt in enumerate((OTHER, LONG, SHORT)):
        with torch.no_grad():
            among = policy.predict(x.expand(3, *x.shape[1:]), steps(0, 3), texts, torch.tensor([0, 1, 2]), guidance)[row]
            alone = policy.predict(x, steps(0, 1), policy.encode([prompt]), torch.tensor([0]), guidance)[0]
        assert (among - alone).abs().max() <= ROUNDING * alone.abs().max().clamp(min=1), prompt


def test_prompts_are_told_apart(case):
    texts, x = case.base.encode(PROMPTS), normal(case.base, 1).expand(3, *case.base.latent_shape)
    with torch.no_grad():
        predictions = case.base.predict(x, steps(0, 3), texts, torch.arange(3), 1.0)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (predictions[one] - predictions[other]).abs().max() > 1e-3


def test_prompts_longer_than_the_limit_are_named(case):
    assert case.base.longer_than_limit([SHORT, ENDLESS, OTHER, ""]) == [ENDLESS]
    assert case.base.longer_than_limit([SHORT, ""]) == []


def test_prompts_that_cannot_be_longer_than_the_limit_are_not_tokenised(case, monkeypatch):
    """A million of them took two minutes; each token has a letter at least, also where a word is unknown."""
    family, seen = case.base.family, []
    limit = family.prompt_limit
    edge = ["q" * (limit - 4), " ".join("zxqj" * limit)[: limit - 4], "." * (limit - 4)]
    assert family.longer_than_limit(edge) == []
    assert all(len(ids) <= limit for ids in family.tokenizer(edge, verbose=False).input_ids)
    monkeypatch.setattr(type(family), "prompt_limit", limit)  # some families ask their tokenizer
    monkeypatch.setattr(type(family), "tokenizer", property(lambda self: lambda part, **more: seen.extend(part)))
    family.longer_than_limit(edge)
    assert seen == []


def test_words_behind_the_limit_change_nothing(case):
    ends = case.base.encode([ENDLESS + "a cat", ENDLESS + "a dog"])
    assert all(part[0].equal(part[1]) for part in ends.parts.values())
    assert case.base.normal_form(ENDLESS + "a cat") == case.base.normal_form(ENDLESS + "a dog")


def test_normal_form_is_stable(case):
    forms = [case.base.normal_form(prompt) for prompt in PROMPTS]
    assert len(set(forms)) == len(PROMPTS)
    assert [case.moved.normal_form(prompt) for prompt in PROMPTS] == forms
    # Stable Diffusion 2 pads with "!", which counts as text there
    assert [case.base.normal_form(form).rstrip("!") for form in forms] == [form.rstrip("!") for form in forms]


# --- guidance -----------------------------------------------------------------------------------------------------------
def test_guidance_doubles_the_batch_unconditional_first(case, monkeypatch):
    policy, calls = case.moved, []
    family, texts, rows, x, k = policy.family, policy.encode(PROMPTS), torch.tensor([2, 0]), normal(policy, 2), torch.tensor([0, STEPS - 1])
    plain = family.denoise
    monkeypatch.setattr(family, "denoise", lambda *arguments: calls.append(arguments) or plain(*arguments))
    with torch.no_grad():
        guided, _ = policy.predict(x, k, texts, rows, GUIDANCE), policy.predict(x, k, texts, rows, 1.0)
        without, conditional = (plain(x, policy.timesteps[k], texts[wanted], GUIDANCE) for wanted in (torch.tensor([3, 3]), rows))
    (seen, times, given, _), (alone, _, only, _) = calls
    assert alone.equal(x) and same(only, texts[rows])
    if family.guidance != "cfg":
        assert seen.equal(x) and same(given, texts[rows]) and guided.equal(conditional)
        return
    assert seen.equal(torch.cat([x, x])) and times.equal(policy.timesteps[torch.cat([k, k])])
    assert same(given, texts[torch.tensor([3, 3, 2, 0])])
    expected = family.combine(without, conditional, GUIDANCE)
    assert (guided - expected).abs().max() <= ROUNDING * expected.abs().max().clamp(min=1)
    assert (guided - conditional).abs().max() > 1e-3


def same(one: Conditioning, other: Conditioning) -> bool:
    return one.parts.keys() == other.parts.keys() and all(part.equal(other.parts[name]) for name, part in one.parts.items())


def test_table_of_calls_knows_every_family():
    from conventions import CALLS

    from tdpo_cli.models import FAMILIES

    assert not set(FAMILIES) - set(CALLS)
