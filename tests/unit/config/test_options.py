"""Every option changes the run: one small run per option on the sandbox, compared with the run without it.

A new option is a visible decision: the tables below name every key of the preset, and the last test says so.
"""

import copy
import dataclasses
import json
import shutil
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from flow_models import SD3
from helpers import LinearPolicy, make_trajectory, tiny_vae
from safetensors.torch import load_file, save_file
from tolerances import assert_same_run, bound, log_prob_error

from tdpo_cli import algorithms, models
from tdpo_cli.algorithms.base import credit as credit_of
from tdpo_cli.algorithms.combination import Combination
from tdpo_cli.algorithms.critic import Critic
from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.config.settings import describe
from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.machine import memory
from tdpo_cli.machine.world import World
from tdpo_cli.models import lora_file
from tdpo_cli.models.policy import Policy
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.randomness import Randomness
from tdpo_cli.rewards import checkpoints as reward_checkpoints
from tdpo_cli.rewards import scoring
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.sandbox import ZOO
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train import epoch as epochs
from tdpo_cli.train import saving, train
from tdpo_cli.train.epoch import run_epoch
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.state import build, make_optimizers
from tdpo_cli.train.update import Observer

# four samples of two prompts in two steps: small, and enough for every option to matter
SMALL = {
    "model.base": "sandbox", "model.lora_rank": 2, "model.dtype": "fp32",
    "rollout.samples_per_epoch": 4, "rollout.steps": 2, "rollout.guidance_scale": 2.0,
    "reward.train": "gold", "reward.zoo": "sandbox", "reward.buffer_size": 4, "reward.min_count": 2,
    "algorithm.critic_init_std": 0.11, "algorithm.reset_every": 1, "algorithm.neuron_rows": 2,
    "update.batch_size": 2, "update.learning_rate": 1e-3, "update.critic_learning_rate": 1e-3, "update.max_grad_norm": 0.1,
    "update.clip_range_critic": 0.05,
    "run.epochs": 1, "run.preview_images": 0,
}  # fmt: skip
TWO = {"run.epochs": 2}  # for what only shows once something has been learnt
SMOOTH = {"update.clip_range": 0.5, "update.clip_range_critic": 0.0}  # at a clip range the last bit decides a whole pair
KL = TWO | {"algorithm.kl_penalty_coef": 1e4}  # log-probs are means, so a KL is small
GRPO = {"algorithm.name": "grpo", "rollout.images_per_prompt": 2}
EMA = {"update.ema_decay": 0.5, "update.ema_every": 1}
# a flow-matching model with a third text encoder; its images are 32 pixels wide, as gold needs them
FLOW = {
    "model.base": str(SD3), "model.resolution": 32, "rollout.steps": 4, "algorithm.name": "ddpo",
}  # fmt: skip


class Table(dict):
    """A table of numbers as a setting's value, which may be part of a key."""

    def __hash__(self):
        return hash(tuple(self.items()))


HELD = TWO | {"reward.at_least": Table({"jpeg-compressibility": 2.0})}  # violated from the start, so that it acts in the second epoch

# key -> (settings that let it matter, values that each must give another run)
CHANGES_THE_RUN = {
    "model.drop_t5": (FLOW, [True]),
    "model.lora_rank": ({}, [3]),
    "model.lora_alpha": ({}, [4.0]),
    "model.lora_targets": ({}, [("to_q",)]),
    "rollout.samples_per_epoch": ({}, [6]),
    "rollout.steps": ({}, [3]),
    "rollout.guidance_scale": ({}, [3.0, 1.0]),
    "rollout.eta": ({}, [0.8]),
    "rollout.noise_level": (FLOW, [0.4]),
    "rollout.window": (FLOW, [1, (2, 0, 2), (2, 1, 3)]),
    "rollout.images_per_prompt": (GRPO, [4]),
    "rollout.negative_prompt": ({}, ["a red circle"]),
    "reward.train": ({}, ["jpeg-incompressibility"]),
    "reward.train_weights": ({}, [Table({"gold": 1.0, "jpeg-incompressibility": weight}) for weight in (1.0, 0.5)]),
    "reward.at_least": (TWO, [HELD["reward.at_least"], Table({"jpeg-compressibility": 1.0})]),
    "reward.constraint_rate": (HELD, [0.2]),
    "reward.constraint_max": (HELD, [0.05]),
    "reward.normalise": ({}, ["global", "none"]),
    "reward.scale_only": ({}, [True]),
    "reward.buffer_size": (TWO, [2]),
    "reward.min_count": (TWO, [4]),
    "reward.clip_range": ({}, [0.1]),
    "algorithm.name": ({"rollout.images_per_prompt": 2}, ["tdpo", "ddpo", "grpo"]),
    "algorithm.gamma": ({}, [0.5]),
    "algorithm.advantage_norm": ({}, ["per-prompt", "none"]),
    "algorithm.advantage_std": (GRPO, ["epoch", "none"]),
    "algorithm.advantage_clip": (GRPO, [0.5]),
    "algorithm.guard": (GRPO | SMOOTH, [True]),
    "algorithm.critic_coef": ({}, [0.0]),
    "algorithm.critic_dropout": ({}, [False]),
    "algorithm.critic_activation": ({}, ["relu"]),
    "algorithm.critic_steps": ({}, [3]),
    "algorithm.critic_init_std": ({}, [0.2, None]),
    "algorithm.reset_every": (TWO, [2]),
    "algorithm.reset_target": ({}, ["dormant", "all", "none"]),
    "algorithm.dormant_threshold": ({}, [0.5]),
    "algorithm.extra_dormant_threshold": ({}, [0.5]),
    "algorithm.neuron_rows": ({}, [1]),
    "algorithm.reference": ({}, [True]),
    "algorithm.kl_penalty": (KL, ["kl", "abs", "square", "approx", "js"]),
    "algorithm.kl_penalty_coef": (TWO | {"algorithm.reference": True}, [1e4]),
    "algorithm.init_kl_coef": (KL, [0.4]),
    "algorithm.kl_target": (KL, [0.1]),
    "algorithm.kl_horizon": (KL | {"algorithm.kl_target": 0.1}, [20]),
    "algorithm.update_mode": ({"algorithm.name": "ddpo"}, ["all-timesteps"]),
    "update.batch_size": ({}, [4]),
    "update.inner_epochs": ({}, [2]),
    "update.learning_rate": ({}, [2e-3]),
    "update.critic_learning_rate": ({}, [2e-3]),
    "update.adam_beta1": ({}, [0.8]),
    "update.adam_beta2": ({}, [0.9]),
    "update.adam_weight_decay": ({}, [0.1]),
    "update.adam_epsilon": ({}, [1e-2]),
    "update.max_grad_norm": ({}, [1e-6]),
    "update.clip_range": ({}, [1e-9]),
    "update.clip_range_critic": ({}, [0.0, 0.01]),
    "update.kl_coef": ({}, [0.1, 10.0]),
    "update.kl_kind": (FLOW | {"update.kl_coef": 10.0}, ["gaussian", "flow-grpo"]),
    "update.ema_decay": ({"update.ema_every": 1}, [0.5, 0.05]),
    "update.ema_every": (EMA, [2]),
    "update.timestep_fraction": ({}, [0.5]),
    "update.shuffle_samples": ({}, [False]),
    "update.shuffle_timesteps": ({}, [False]),
    "update.guidance": ({}, [False]),
    "run.seed": ({}, [7]),
}  # fmt: skip

# what only shows with real networks; all the rest is arithmetic on what they gave
OF_THE_NETWORKS = {
    "rollout.eta", "rollout.noise_level", "rollout.window", "rollout.negative_prompt", "rollout.images_per_prompt", "reward.train",
    "algorithm.critic_activation", "update.kl_kind", "update.ema_decay", "update.ema_every",
}  # fmt: skip
# seconds each; smaller tests of the same: test_flow_families, test_flow, test_groups_hold_one_prompt_each, test_average, test_losses
TESTED_ELSEWHERE = {
    "model.drop_t5", "rollout.images_per_prompt", "rollout.noise_level", "rollout.window", "update.ema_decay", "update.ema_every", "update.kl_kind",
}  # fmt: skip
MATHEMATICS = [key for key in CHANGES_THE_RUN if key not in OF_THE_NETWORKS and not key.startswith("model.")]


@cache
def small_run(overrides: tuple) -> dict:
    """What a run leaves behind, in numbers: metrics, weights, the algorithm's memory."""
    job = start(dict(overrides))
    rows = [run_epoch(job, epoch, Console(quiet=True)) for epoch in range(job.preset.run.epochs)]
    timeless = [{k: v for k, v in row.items() if "second" not in k and k != "peak_memory_bytes"} for row in rows]
    return {"rows": timeless, "state": job.state_dict(), "job": job}


def settings_of(changes: dict) -> presets.Preset:
    return presets.override(presets.Preset(), list((SMALL | changes).items()))


def start(changes: dict, micro_batch: int = 8):
    torch.manual_seed(0)
    return build(settings_of({"rollout.prompts": str(two_prompts())} | changes), World(), memory.Plan.of(micro_batch))


@cache
def two_prompts():
    import tempfile

    file = Path(tempfile.mkdtemp()) / "prompts.txt"
    file.write_text("\n".join(prompts.load("sandbox")[:2]))
    return file


def run_with(changes: dict) -> dict:
    return small_run(tuple(sorted(changes.items(), key=lambda item: item[0])))


def same(a, b) -> bool:
    """Equal to the last bit, whatever is inside."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def numbers(run: dict) -> tuple:
    """Without the optimizers' settings, which would differ even if nobody read them."""
    state = {key: value for key, value in run["state"].items() if key not in ("policy_optimizer", "critic_optimizer", "scaler")}
    return run["rows"], state


@pytest.mark.slow
def test_the_same_settings_give_the_same_run():
    """So that a difference below means the option and nothing else."""
    again = small_run.__wrapped__(())
    assert same(numbers(run_with({})), numbers(again))


@cache
def small_mathematics(overrides: tuple) -> dict:
    """The same of a policy of four weights on made-up samples and scores: credit, update and resets without networks that sample or score."""
    preset, draw = settings_of(dict(overrides)), torch.Generator().manual_seed(5)
    policy, critic = LinearPolicy(preset.rollout.steps), Critic(5, preset.algorithm.critic_init_std or 0.1) if preset.has_critic else None
    randomness = Randomness(preset.run.seed)
    if critic:
        critic.initialise(randomness.initial_weights("critic"))
    job = types.SimpleNamespace(
        preset=preset, policy=policy, critic=critic, algorithm=algorithms.make(preset), optimizers=make_optimizers(policy, critic, preset),
        randomness=randomness, plan=memory.Plan.of(8), world=World(), combination=Combination(preset),
    )  # fmt: skip
    found = {}
    for epoch in range(2):
        samples = make_trajectory(policy, preset.rollout.samples_per_epoch, guidance=preset.rollout.guidance_scale, epoch=epoch, seed=epoch)
        if preset.scores_reference:
            away = torch.randn(samples.log_probs.shape, generator=draw) / 10
            samples = dataclasses.replace(samples, ref_log_probs=samples.log_probs + away)
        scores = {name: torch.randn(len(samples), generator=draw) for name in job.combination.names}
        job.combination.begin(scores)
        credit = credit_of(job.algorithm, samples, scores, job.combination)
        _, neurons = epochs._inner_epochs(job, samples, credit, epochs._orders(job, epoch), Observer())
        job.algorithm.after_epoch(credit)
        job.combination.after_epoch(scores)
        networks = {**policy.trainable, **(critic.state_dict() if critic else {})}
        found[epoch] = [dataclasses.asdict(credit), neurons, {name: weight.detach().clone() for name, weight in networks.items()}]
    return found | {"memory": copy.deepcopy(job.algorithm.state_dict())}


def all_differ(key: str, run, content=lambda found: found) -> None:
    given, values = CHANGES_THE_RUN[key]
    made = [content(run(tuple(sorted(changes.items())))) for changes in (given, *(given | {key: value} for value in values))]
    for i, one in enumerate(made):
        for other in made[i + 1 :]:
            assert not same(one, other), f"{key}: {values} and the default give the same"


@pytest.mark.parametrize("key", MATHEMATICS)
def test_option_changes_the_mathematics(key):
    all_differ(key, small_mathematics)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=pytest.mark.slow) if key in TESTED_ELSEWHERE.union(MATHEMATICS) else key for key in CHANGES_THE_RUN]
)
def test_option_changes_the_run(key):
    all_differ(key, small_run, numbers)


# --- what some of them do, beyond making a difference -----------------------------------------------------------------
def weights(run, part="policy"):
    return run["state"][part]


@pytest.mark.slow
def test_the_base_run_really_trains():
    rows = run_with({})["rows"]
    assert rows[-1]["updates"] == 4 and rows[0]["skipped_steps"] == 0
    assert rows[0]["ratio_drift"] <= 2 * log_prob_error(SMALL["rollout.steps"])
    assert any((p != 0).any() for name, p in weights(run_with({})).items() if "lora_B" in name)


@pytest.mark.slow
def test_extra_threshold_is_logged_and_changes_nothing_else():
    plain, extra = run_with({}), run_with({"algorithm.extra_dormant_threshold": 0.5})
    assert plain["rows"][0]["dormant_fraction_extra"] is None
    assert extra["rows"][0]["dormant_fraction_extra"] > extra["rows"][0]["dormant_fraction"]
    assert same(weights(plain, "critic"), weights(extra, "critic"))


@pytest.mark.slow
def test_reference_alone_is_logged_and_changes_nothing_else():
    plain, logged = run_with(TWO), run_with(TWO | {"algorithm.reference": True})
    assert [row["mean_kl"] for row in plain["rows"]] == [None, None]
    assert logged["rows"][0]["mean_kl"] == 0  # up = 0: nothing has been learnt yet
    assert logged["rows"][1]["mean_kl"] != 0
    assert same(weights(plain), weights(logged))


@pytest.mark.slow
def test_ddpo_has_no_critic():
    run = run_with({"algorithm.name": "ddpo"})
    assert run["job"].critic is None and run["job"].encoder is None
    for name in ("critic_loss", "critic_grad_norm", "critic_explained_variance", "dormant_fraction", "reset"):
        assert run["rows"][0][name] is None


@pytest.mark.slow
def test_all_timesteps_takes_one_step_per_batch():
    assert run_with({"algorithm.name": "ddpo"})["rows"][0]["updates"] == 4
    assert run_with({"algorithm.name": "ddpo", "algorithm.update_mode": "all-timesteps"})["rows"][0]["updates"] == 2


def test_groups_hold_one_prompt_each_and_their_prompts_differ():
    job = start(GRPO)
    draws = [Actor(job.policy, None, None, job.randomness, job.preset, job.plan).draw(epoch, job.prompts).prompts for epoch in range(8)]
    assert all(prompts[0] == prompts[1] != prompts[2] == prompts[3] for prompts in draws)
    assert len(set(draws)) == 2  # both orders of the two prompts


def test_more_groups_than_distinct_prompts_are_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\nA  RED circle\n")  # which the text encoder reads alike
    with pytest.raises(RequestError, match="4 in groups of 2 .* needs 2 distinct prompts an epoch; .* has 1"):
        start(GRPO | {"rollout.prompts": str(file)})


@pytest.mark.slow
def test_without_a_kl_coefficient_there_is_no_reference_pass(monkeypatch):
    real, references = Policy.transition, []
    monkeypatch.setattr(
        Policy, "transition", lambda self, *args, reference=False: references.append(reference) or real(self, *args, reference=reference)
    )
    for coefficient in (0.0, 0.1):
        references.clear()
        row = run_epoch(start({"update.kl_coef": coefficient}), 0, Console(quiet=True))
        assert any(references) == (coefficient > 0)
        assert (row["kl_loss"] is None) == (coefficient == 0)


@pytest.mark.slow
def test_the_checkpoint_holds_the_average_and_the_state_the_weights(tmp_path):
    job = start(EMA)
    run_epoch(job, 0, Console(quiet=True))
    raw, average = job.state_dict()["policy"], job.optimizers.average
    with job.optimizers.averaged():
        job.policy.save(tmp_path)
        held = job.policy.state_dict()
    assert same(list(held.values()), average.values) and not same(held, raw)
    assert same(job.policy.state_dict(), raw)
    saved = {
        name.replace("unet.", "").replace(".lora", "").replace(".weight", ""): value for name, value in load_file(tmp_path / lora_file.FILE).items()
    }
    assert len(saved) == len(held) and same(sorted(v.sum().item() for v in saved.values()), sorted(v.sum().item() for v in held.values()))


@pytest.mark.slow
def test_a_moving_average_goes_on_exactly_after_a_resume(tmp_path):
    straight, cut = start(EMA), start(EMA)
    for epoch in range(2):
        run_epoch(straight, epoch, Console(quiet=True))
    run_epoch(cut, 0, Console(quiet=True))
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    resumed = start(EMA)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_epoch(resumed, 1, Console(quiet=True))
    assert same(straight.state_dict(), resumed.state_dict())


def resets(**changes):
    """How many neurons each of two epochs reset."""
    found = small_mathematics(tuple((key.replace("__", "."), value) for key, value in changes.items()))
    return [found[epoch][1].get("reset", 0) for epoch in (0, 1)]


def test_only_tdpo_r_resets():
    assert [count > 0 for count in resets(algorithm__reset_every=2)] == [False, True]
    assert resets(algorithm__name="tdpo") == resets(algorithm__name="ddpo") == resets(algorithm__reset_target="none") == [0, 0]
    assert resets(algorithm__reset_target="all") == [1024 + 128 + 64 + 16] * 2
    active, dormant = (resets(algorithm__reset_target=target)[0] for target in ("active", "dormant"))
    assert active + dormant == 1024 + 128 + 64 + 16


@pytest.mark.slow
def test_guidance_off_while_training_moves_the_ratio():
    """The rollout is guided and the update is not, so old and new log-probs differ from the first step on."""
    rounding = 2 * log_prob_error(SMALL["rollout.steps"])
    assert run_with({})["rows"][0]["ratio_drift"] <= rounding
    assert run_with({"update.guidance": False})["rows"][0]["ratio_drift"] > 4 * rounding


@pytest.mark.slow
def test_micro_batch_never_changes_the_result():
    one, many = start(SMOOTH, micro_batch=1), start(SMOOTH, micro_batch=8)
    assert_same_run(*(run_epoch(job, 0, Console(quiet=True)) for job in (one, many)), one.preset)


# --- options that are no part of the mathematics ------------------------------------------------------------------------
def base():
    """model.base: a word, a folder"""
    other = Path(__file__).parents[2] / "data/trace_a/model/pipeline"
    widths = [start(given).policy.family.network.config["block_out_channels"] for given in ({"model.base": str(other)}, {})]
    assert widths[0] != widths[1]


def start_from(tmp_path):
    """model.start_from: training begins at the weights of another run, which stay as they are beside the new ones."""
    trained = run_with({})["job"].policy
    trained.save(tmp_path)
    policy = start({"model.start_from": str(tmp_path)}).policy
    loaded = {name: p for name, p in policy.family.network.named_parameters() if ".start." in name}
    assert same({name.replace(".start.", ".policy."): p.detach() for name, p in loaded.items()}, trained.state_dict())
    assert not any(p.requires_grad for p in loaded.values()) and not any(p.any() for name, p in policy.trainable.items() if "lora_B" in name)


def text_lora(tmp_path):
    """model.text_lora: refuse names the weights; fuse keeps them, frozen, and writes them into every checkpoint."""
    trained = run_with({})["job"].policy
    trained.save(tmp_path)
    file = tmp_path / lora_file.FILE
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = trained.family.pipeline.text_encoder.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    with_text = load_file(file) | {
        f"{layer}.lora_A.weight": torch.randn(2, width, generator=draw), f"{layer}.lora_B.weight": torch.randn(width, 2, generator=draw),
    }  # fmt: skip
    save_file(with_text, file)  # without the metadata: rank and alpha are the same
    with pytest.raises(RequestError, match=rf"has 2 weights of text encoders \({layer}.lora_A.weight, ...\).*model.text_lora=fuse"):
        start({"model.start_from": str(tmp_path)})
    policy = start({"model.start_from": str(tmp_path), "model.text_lora": "fuse"}).policy
    changed, plain = (one.encode(["a red circle"]).parts["embeds"] for one in (policy, trained))
    assert (changed - plain).abs().max() > 1e-2
    assert not any(p.requires_grad for p in policy.family.pipeline.text_encoder.parameters())
    policy.save(tmp_path / "again")
    model = dataclasses.replace(settings_of({}).model, start_from=str(tmp_path / "again"))
    assert same(models.load(model, trainable=False).encode(["a red circle"]).parts["embeds"], changed)
    assert same(models.load(model, trainable=False, lora_scale=0.0).encode(["a red circle"]).parts["embeds"], plain)


def vae(tmp_path):
    """model.vae: images through another one; test_sdxl says where it may lie."""
    policy = start({}).policy
    other = copy.deepcopy(policy.family.pipeline.vae)
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.3)
    other.save_pretrained(tmp_path)
    latents = torch.zeros(1, *policy.latent_shape)
    assert not same(start({"model.vae": str(tmp_path)}).policy.decode(latents), policy.decode(latents))


def allow_distilled(tmp_path):
    """model.allow_distilled: test_sdxl says what counts as distilled."""
    shutil.copytree(ZOO / "pipeline", tmp_path / "some-turbo")
    with pytest.raises(RequestError, match="--allow-distilled"):
        start({"model.base": str(tmp_path / "some-turbo")})
    start({"model.base": str(tmp_path / "some-turbo"), "model.allow_distilled": True})


def dtype():
    """model.dtype: of the base networks on an accelerator (`meta` has no numbers, but types); LoRA weights stay fp32."""
    for name, expected in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model = dataclasses.replace(settings_of({}).model, dtype=name)
        policy = models.load(model, device="meta")
        assert {policy.family.network.conv_in.weight.dtype, policy.family.pipeline.vae.dtype, policy.family.pipeline.text_encoder.dtype} == {expected}
        assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
        assert models.load(model, device="cpu").family.network.conv_in.weight.dtype == torch.float32
    half, whole = (memory.estimate(presets.load("hpsv2", [("model.dtype", name)])) for name in ("fp16", "fp32"))
    assert half < whole


def tf32():
    """model.tf32"""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for wanted in (True, False):
            start({"model.tf32": wanted})
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (wanted, wanted)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def revision(monkeypatch):
    """model.revision reaches the hub; test_sd_layouts loads two revisions from a cache."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, revision, **kwargs: asked.append(revision) or str(ZOO / "nothing"))
    with pytest.raises(RequestError):
        models.load(dataclasses.replace(settings_of({}).model, base="someone/model", revision="v7"))
    assert asked == ["v7"]


def rollout_prompts():
    """rollout.prompts"""
    assert start({"rollout.prompts": "sandbox"}).prompts == prompts.load("sandbox")
    assert start({}).prompts == prompts.load("sandbox")[:2]


def eval_prompts():
    """rollout.eval_prompts is for cross-eval; the dry run names it."""
    from helpers import tdpo

    file = two_prompts()
    assert f"held out: {file}" in tdpo("train", "--dry-run", "--set", f"rollout.eval_prompts={file}").err.replace("\n", "")


def watch():
    """reward.watch: logged, never trained on."""
    plain, watching = run_with({}), run_with({"reward.watch": ("jpeg-compressibility",)})
    assert "rewards/jpeg-compressibility/mean" in watching["rows"][0]
    assert same(weights(plain), weights(watching))


def zoo():
    """reward.zoo: the embedded checkpoints; without it the published ones, which are not on this machine."""
    assert reward_checkpoints("sandbox", {})["aesthetic"] == str(ZOO / "aesthetic")
    assert reward_checkpoints(None, {}) == {}
    with pytest.raises(RequestError, match="aesthetic"):
        start({"reward.zoo": None, "reward.train": "aesthetic"})


def checkpoints(tmp_path):
    """reward.checkpoints: this path and no other."""
    shutil.copytree(ZOO / "aesthetic", tmp_path / "head")
    (tmp_path / "head" / "sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"no head")
    with pytest.raises(RequestError, match=str(tmp_path / "head")):
        start({"reward.train": "aesthetic", "reward.checkpoints": {"aesthetic": str(tmp_path / "head")}})
    assert scoring.load_rewards(["aesthetic"], Backbones("cpu"), {"aesthetic": str(ZOO / "aesthetic")})


def run_folder(tmp_path):
    """run.epochs, run.save_every, run.keep_last, run.preview_images, run.micro_batch"""
    wanted = {"run.epochs": 5, "run.save_every": 2, "run.keep_last": 2, "run.preview_images": 3, "run.micro_batch": 3}
    train.run(settings_of(wanted | {"rollout.prompts": str(two_prompts())}), tmp_path, False, Console(quiet=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch_0003", "epoch_0004"]
    assert len(list((tmp_path / "images").glob("epoch_*.png"))) == 5
    assert json.loads((tmp_path / "env.json").read_text())[0]["micro_batch"] == 3


def preview_images():
    """run.preview_images 0 draws none (as in every run here)"""
    from tdpo_cli.train import saving

    assert saving.preview(run_with({})["job"], None, "", "") is None


def stopping_early(tmp_path, monkeypatch):
    """run.stop_on_overoptimisation: so many epochs in a row with that verdict end the run."""
    monkeypatch.setattr(verdict, "read", lambda rows, preset: verdict.Verdict("over-optimising", ""))
    for patience, expected in ((2, 2), (None, 4)):
        wanted = {"run.epochs": 4, "run.stop_on_overoptimisation": patience, "rollout.prompts": str(two_prompts())}
        train.run(settings_of(wanted), tmp_path / str(patience), False, Console(quiet=True))
        assert len((tmp_path / str(patience) / "metrics.jsonl").read_text().splitlines()) == expected


def tracking(tmp_path):
    """run.trackers: told of every epoch; test_trackers says what."""
    pytest.importorskip("tensorboard")
    train.run(settings_of({"run.trackers": ("tensorboard",), "rollout.prompts": str(two_prompts())}), tmp_path, False, Console(quiet=True))
    assert (tmp_path / "trackers/tensorboard/next_epoch.txt").read_text() == "1"


def max_bad_steps(monkeypatch):
    """run.max_bad_steps: that many broken optimizer steps end the run, fewer do not."""

    def broken(self, *args, **kwargs):
        transition = real(self, *args, **kwargs)
        return dataclasses.replace(transition, mean=transition.mean * float("nan")) if torch.is_grad_enabled() and next(bad) else transition

    real = Policy.transition
    for limit, stops in ((2, True), (3, False)):
        bad = iter([True, True] + [False] * 20)
        job = start({"run.max_bad_steps": limit})
        monkeypatch.setattr(Policy, "transition", broken)
        if stops:
            with pytest.raises(WorkError, match="2 optimizer steps with a non-finite loss"):
                run_epoch(job, 0, Console(quiet=True))
        else:
            row = run_epoch(job, 0, Console(quiet=True))
            assert row["skipped_steps"] == 2 and row["updates"] == 2
        monkeypatch.setattr(Policy, "transition", real)


def optimizer(monkeypatch):
    """update.optimizer adamw-8bit without bitsandbytes: one message that says what to install."""
    job = start({})
    assert type(job.optimizers.policy) is torch.optim.AdamW
    eight = dataclasses.replace(job.preset, update=dataclasses.replace(job.preset.update, optimizer="adamw-8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RequestError, match=r"adamw-8bit needs bitsandbytes: pip install bitsandbytes"):
        make_optimizers(job.policy, job.critic, eight)
    # ... and with it, its class for the policy; the critic keeps fp32 states
    fake = types.ModuleType("bitsandbytes.optim")
    fake.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    optimizers = make_optimizers(job.policy, job.critic, eight)
    assert type(optimizers.policy) is fake.AdamW8bit and type(optimizers.critic) is torch.optim.AdamW


def memory_limit(tmp_path):
    """run.memory_limit: a smaller plan, written down; the same result."""
    preset = settings_of({"rollout.prompts": str(two_prompts())} | SMOOTH)
    tight = memory.estimate(preset, 1, memory.CPU_LADDER[-1], gpu=False)
    train.run(presets.override(preset, [("run.memory_limit", str(tight))]), tmp_path / "tight", False, Console(quiet=True), "cpu")
    entry = json.loads((tmp_path / "tight" / "env.json").read_text())[0]
    assert entry["micro_batch"] == entry["plan"]["micro_batch"] == 1 and entry["memory_limit"] == str(tight)
    row, roomy = json.loads((tmp_path / "tight" / "metrics.jsonl").read_text()), run_with(SMOOTH)["rows"][0]
    assert_same_run({name: row[name] for name in roomy}, roomy, preset)


def compiled():
    """run.compile: the UNet's transformer blocks, and nothing unless asked for."""
    for wanted in (True, False):
        unet = start({"run.compile": wanted}).policy.family.network
        blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
        assert blocks and {module._compiled_call_impl is not None for module in blocks} == {wanted}


def sharded():
    """run.shard: on needs several processes; the sharded run itself is in tests/distributed/test_world_sizes.py."""
    with pytest.raises(RequestError, match="sharding needs several processes"):
        start({"run.shard": "on"})
    start({"run.shard": "auto"})


def kept_embeddings():
    """run.cache_limit: read where text encoders are large; test_embeddings says what it does."""
    assert start({"run.cache_limit": "nothing"}).policy.embeddings is None  # the sandbox's are tiny
    preset = settings_of({"model.base": str(SD3), "run.cache_limit": "12 apples"})
    with pytest.raises(RequestError, match="run.cache_limit '12 apples': expected a size such as 12GB or 800MiB, or none"):
        build(preset, World(), memory.Plan.of(1))


def quantised(monkeypatch):
    """model.quantise: refused where its package is absent; test_quantise says what it does."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(RequestError, match=r"model.quantise int8 needs torchao: pip install 'tdpo\[int8\]'"):
        start({"model.quantise": "int8"})


def shown_images(tmp_path, monkeypatch):
    """[sampling] reaches previews; without it they are made as the rollout samples."""
    pictures = {}
    for key, value in {"": None, "sampling.steps": 4, "sampling.guidance_scale": 2.5, "sampling.noise": 0.0}.items():
        job, folder = start({"run.preview_images": 1} | ({key: value} if key else {})), RunDir(tmp_path / (key or "plain"))
        (folder.path / "images").mkdir(parents=True)
        saving.preview(job, folder, "title", "shown.png")
        pictures[key] = (folder.path / "images/shown.png").read_bytes()
        assert len(job.policy.timesteps) == job.preset.rollout.steps  # the rollout's schedule is untouched
    assert len(set(pictures.values())) == 4
    as_rollout = settings_of({"rollout.eta": 0.8}).shown
    assert (as_rollout.steps, as_rollout.guidance_scale, as_rollout.noise) == (2, 2.0, 0.8)


def dynamics():
    """rollout.dynamics: the family's own when it is written out, another run otherwise."""
    assert same(numbers(run_with({"rollout.dynamics": "ddim"})), numbers(run_with({})))
    runs = {name: numbers(run_with(FLOW | {"rollout.dynamics": name})) for name in (None, "flow-sde", "cps", "dance-sde")}
    assert same(runs["flow-sde"], runs[None])
    assert not same(runs["flow-sde"], runs["cps"])
    assert not same(runs["flow-sde"], runs["dance-sde"]) and not same(runs["cps"], runs["dance-sde"])


def critic_state():
    """algorithm.critic_state: the family's own when it is written out, another run otherwise; test_critic_view says what the critic sees."""
    runs = {name: numbers(run_with({"algorithm.critic_state": name})) for name in (None, "x_t", "x0")}
    assert same(runs["x_t"], runs[None]) and not same(runs["x0"], runs[None])
    # flow matching has the other one
    assert run_with(FLOW | {"algorithm.name": "tdpo"})["job"].preset.algorithm.critic_state == "x0"
    # without a critic, it is as meaningless as the critic's other settings
    plain, given = (run_with({"algorithm.name": "ddpo"} | more) for more in ({}, {"algorithm.critic_state": "x0"}))
    assert same(numbers(plain), numbers(given)) and plain["job"].preset.algorithm.critic_state is None


def critic_view(tmp_path):
    """algorithm.critic_view and model.tiny_vae: each view gives another run, as does another decoder; test_critic_view says what each is."""
    chosen = {}
    for seed in (0, 1):
        chosen[f"tiny {seed}"] = {"algorithm.critic_view": "tiny", "model.tiny_vae": tiny_vae(tmp_path / str(seed), seed)}
    chosen |= {name: {"algorithm.critic_view": name} for name in ("decode", "rgb")}
    runs = {name: numbers(run_with(changes)) for name, changes in chosen.items()}
    assert same(runs["decode"], numbers(run_with({})))
    assert not any(same(runs[one], runs[other]) for one in runs for other in runs if one < other)
    # neither is read where another setting leaves it without a meaning
    for changes in ({"algorithm.name": "ddpo"}, {"model.tiny_vae": str(tmp_path / "nowhere")}):
        unread = {"algorithm.critic_view": "tiny"} if "algorithm.name" in changes else {}
        assert same(numbers(run_with(changes | unread)), numbers(run_with({} if "model.tiny_vae" in changes else changes)))


def vae_tiling():
    """model.vae_tiling: images larger than a tile have slightly other pixels; smaller ones have the same."""
    plain, tiled = (start({"model.resolution": 64, "model.vae_tiling": on}).policy for on in (False, True))
    assert tiled.family.pipeline.vae.use_tiling and not plain.family.pipeline.vae.use_tiling
    latents = torch.randn(1, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    one, other = plain.decode(latents), tiled.decode(latents)
    assert one.shape == other.shape == (1, 3, 64, 64) and 0 <= float(other.min()) < float(other.max()) <= 1
    assert 1e-4 < (one - other).abs().mean() < 0.1
    small = latents[:, :, :8, :8]
    assert torch.equal(plain.decode(small), tiled.decode(small))


def resolution():
    """Pixels: one number or two; latents follow, and what does not divide is refused."""
    shapes = {value: start({"model.resolution": value}).policy.latent_shape for value in (32, (16, 48))}
    assert shapes == {32: (4, 8, 8), (16, 48): (4, 4, 12)}
    with pytest.raises(RequestError, match="model.resolution 33 x 33: both must be multiples of 4"):
        start({"model.resolution": 33})


ELSEWHERE = {
    "sampling.steps": shown_images,
    "sampling.guidance_scale": shown_images,
    "sampling.noise": shown_images,
    "model.resolution": resolution,
    "model.base": base,
    "model.revision": revision,
    "model.start_from": start_from,
    "model.text_lora": text_lora,
    "model.vae": vae,
    "model.allow_distilled": allow_distilled,
    "model.quantise": quantised,
    "model.dtype": dtype,
    "model.tf32": tf32,
    "rollout.dynamics": dynamics,
    "algorithm.critic_state": critic_state,
    "algorithm.critic_view": critic_view,
    "model.tiny_vae": critic_view,
    "model.vae_tiling": vae_tiling,
    "rollout.prompts": rollout_prompts,
    "rollout.eval_prompts": eval_prompts,
    "reward.watch": watch,
    "reward.zoo": zoo,
    "reward.checkpoints": checkpoints,
    "update.optimizer": optimizer,
    "run.epochs": run_folder,
    "run.save_every": run_folder,
    "run.keep_last": run_folder,
    "run.preview_images": preview_images,
    "run.micro_batch": run_folder,
    "run.memory_limit": memory_limit,
    "run.compile": compiled,
    "run.shard": sharded,
    "run.cache_limit": kept_embeddings,
    "run.max_bad_steps": max_bad_steps,
    "run.trackers": tracking,
    "run.stop_on_overoptimisation": stopping_early,
}


# seconds each; smaller tests of the same are in other files: test_verdict, test_trackers, test_memory, test_flow, test_critic_view,
# test_bad_input (save_every, keep_last, micro_batch), test_numbers (max_bad_steps)
SLOW = (
    stopping_early, tracking, memory_limit, compiled, shown_images, dynamics, critic_view, critic_state, run_folder, max_bad_steps,
    dtype, vae, text_lora, sharded, watch, base, rollout_prompts, tf32, resolution, optimizer, vae_tiling,
    start_from,
)  # fmt: skip


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=pytest.mark.slow) if check in SLOW else check for check in dict.fromkeys(ELSEWHERE.values())],
    ids=lambda check: check.__name__,
)
def test_option_outside_the_mathematics(check, request):
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(**{name: request.getfixturevalue(name) for name in wanted})


def test_every_option_of_the_preset_is_in_a_table():
    declared = {key for key, _, _, _ in describe()}
    assert declared == CHANGES_THE_RUN.keys() | ELSEWHERE.keys()
    assert not CHANGES_THE_RUN.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("key", CHANGES_THE_RUN)
def test_every_choice_of_an_option_is_tried(key):
    """All values of a closed list, the default (or the base run's) among them."""
    section, name = key.split(".")
    kind = next(kind for known, kind, _, _ in describe() if known == key)
    if " | " not in kind or key == "algorithm.critic_init_std":
        return
    choices = {
        choice
        for choice in kind.split(" | ")
        if choice not in ("none", "a number", "a whole number", "a string", "[size, first, last]", "a list of strings")
    }
    given, values = CHANGES_THE_RUN[key]
    started = getattr(getattr(settings_of(given), section), name)
    assert choices <= {started, *values}


# --- the reference ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_reference_of_a_lora_is_the_network_without_it():
    policy = run_with({"algorithm.reference": True})["job"].policy
    assert not hasattr(policy.adapter, "reference")  # no second network
    fresh = start({}).policy
    x_t, k = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
    texts, rows = policy.encode(["a red circle"]), torch.tensor([0])
    with torch.no_grad():
        reference, trained = (policy.predict(x_t, k, texts, rows, 2.0, reference=flag) for flag in (True, False))
        untrained = fresh.predict(x_t, k, texts, rows, 2.0)
    assert torch.equal(reference, untrained) and not torch.equal(trained, untrained)


@pytest.mark.slow
def test_full_fine_tuning_trains_everything_against_a_frozen_copy():
    run = run_with(TWO | {"model.lora_rank": 0, "algorithm.reference": True, "update.learning_rate": 1e-5})
    policy = run["job"].policy
    assert policy.trainable.keys() == dict(policy.family.network.named_parameters()).keys()
    assert not any(p.requires_grad for p in policy.adapter.reference.parameters())
    assert run["rows"][0]["mean_kl"] == 0 and run["rows"][1]["mean_kl"] != 0
    fresh = start({}).policy.family.network
    frozen = dict(policy.adapter.reference.named_parameters())
    assert all(torch.equal(p, frozen[name.replace(".base_layer", "")]) for name, p in fresh.named_parameters() if "lora_" not in name)
    moved = [name for name, p in policy.family.network.named_parameters() if not torch.equal(p, frozen[name])]
    assert len(moved) == len(frozen)


def test_full_fine_tuning_without_a_reference_keeps_one_copy():
    assert start({"model.lora_rank": 0}).policy.adapter.reference is None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_a_resumed_run_equals_a_straight_one(tmp_path, rank):
    """LoRA, and the whole UNet; with an adaptive KL controller and its reference."""
    changes = {"model.lora_rank": rank, "update.learning_rate": 1e-4, **KL, "algorithm.kl_target": 0.1, "rollout.prompts": str(two_prompts())}
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train.run(settings_of(changes | {"run.epochs": 2}), straight, False, Console(quiet=True))
    train.run(settings_of(changes | {"run.epochs": 1}), cut, False, Console(quiet=True))
    train.run(settings_of(changes | {"run.epochs": 2}), cut, True, Console(quiet=True))
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (straight, cut)]
    for one, other in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k and "memory" not in k} == {
            k: v for k, v in other.items() if "second" not in k and "memory" not in k
        }
    assert (straight / "checkpoints/epoch_0001/unet/config.json").exists() == (rank == 0)


# --- the fp16 loss scaler, enabled on a CPU -----------------------------------------------------------------------------
def with_scaler(scale: float):
    job = start({"update.max_grad_norm": 1.0})
    job.optimizers.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    return job


@pytest.mark.slow
def test_the_scaler_changes_no_number():
    scaled, plain = with_scaler(2.0**10), start({"update.max_grad_norm": 1.0})
    rows = [run_epoch(job, 0, Console(quiet=True)) for job in (scaled, plain)]
    assert abs(rows[0]["policy_grad_norm"] - rows[1]["policy_grad_norm"]) <= bound("policy_grad_norm", rows[1], plain.preset)
    assert rows[0]["critic_grad_norm"] == rows[1]["critic_grad_norm"]  # the critic is never scaled
    assert rows[0]["overflowed_steps"] == rows[0]["skipped_steps"] == 0


@pytest.mark.slow
def test_an_overflow_skips_the_policy_step_only_and_is_no_fault(monkeypatch):
    job = with_scaler(2.0**126)  # times any gradient: infinite in fp32
    before = job.policy.state_dict(), {k: v.clone() for k, v in job.critic.state_dict().items()}
    row = run_epoch(job, 0, Console(quiet=True))
    assert row["overflowed_steps"] >= 1 and row["skipped_steps"] == 0 and job.bad_steps == 0
    assert row["updates"] == 4
    assert row["policy_loss"] is not None and row["critic_loss"] is not None
    assert not same(before[1], job.critic.state_dict())
    assert job.optimizers.scaler.get_scale() == 2.0 ** (126 - row["overflowed_steps"])
    if row["overflowed_steps"] == 4:
        assert same(before[0], job.policy.state_dict())


@pytest.mark.slow
def test_a_broken_loss_is_a_fault_with_a_scaler_too(monkeypatch):
    real = Policy.transition

    def broken(self, *args, **kwargs):
        transition = real(self, *args, **kwargs)
        return dataclasses.replace(transition, mean=transition.mean * float("nan")) if torch.is_grad_enabled() else transition

    job = with_scaler(1024.0)
    monkeypatch.setattr(Policy, "transition", broken)
    with pytest.raises(WorkError, match="every optimizer step of the epoch had a non-finite loss"):
        run_epoch(job, 0, Console(quiet=True))


@pytest.mark.slow
def test_the_scale_is_checkpointed():
    job = with_scaler(2.0**126)
    run_epoch(job, 0, Console(quiet=True))
    state = job.state_dict()
    again = with_scaler(1.0)
    again.load_state_dict(state)
    assert again.optimizers.scaler.get_scale() == job.optimizers.scaler.get_scale() < 2.0**126


@pytest.mark.slow
def test_a_state_without_a_scaler_loads_where_one_is_needed():
    """A run that went on from a CPU to a GPU starts with the scaler's own first scale."""
    job = with_scaler(64.0)
    job.load_state_dict(start({}).state_dict())
    assert job.optimizers.scaler.get_scale() == 64.0


# --- 8-bit AdamW ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow  # bitsandbytes takes 20 s to import
def test_8bit_adamw_trains_and_resumes_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"model.lora_rank": 0, "update.optimizer": "adamw-8bit", "update.learning_rate": 1e-5}
    job = start(changes)
    run_epoch(job, 0, Console(quiet=True))
    state = job.state_dict()
    assert torch.uint8 in {entry["state1"].dtype for entry in job.optimizers.policy.state.values()}
    torch.save(state, tmp_path / "state.pt")  # as a run's state is written and read
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = start(changes)
    again.load_state_dict(state)
    rows = [run_epoch(one, 1, Console(quiet=True)) for one in (job, again)]
    assert rows[0]["policy_loss"] == rows[1]["policy_loss"]
    assert same(job.policy.state_dict(), again.policy.state_dict())


# --- on a GPU --------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rank", [2, 0])
def test_a_gpu_computes_in_the_asked_type(dtype, rank):
    preset = settings_of({"rollout.prompts": str(two_prompts()), "model.dtype": dtype, "model.lora_rank": rank, "update.learning_rate": 1e-5})
    job = build(preset, World(device="cuda"), memory.Plan.of(8))
    assert job.optimizers.scaler.is_enabled() == (dtype == "fp16")
    row = run_epoch(job, 0, Console(quiet=True))
    assert {p.dtype for p in job.policy.trainable.values()} == {p.dtype for p in job.critic.parameters()} == {torch.float32}
    assert row["skipped_steps"] == 0 and row["policy_loss"] is not None
    assert row["ratio_drift"] < 1e-3


@pytest.mark.gpu
def test_8bit_adamw_on_a_gpu():
    pytest.importorskip("bitsandbytes")
    preset = settings_of({"rollout.prompts": str(two_prompts()), "model.dtype": "fp16", "update.optimizer": "adamw-8bit"})
    job = build(preset, World(device="cuda"), memory.Plan.of(8))
    assert type(job.optimizers.policy).__name__ == "AdamW8bit"
    assert run_epoch(job, 0, Console(quiet=True))["skipped_steps"] == 0
