"""The shipped presets of the paper's experiments state the published numbers, and a dry run says what they mean."""

import json
import re
import subprocess
import sys

import pytest
from helpers import tdpo

from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.config.preset import tomllib

# The published numbers, by our keys. Every key of the preset is here, so a new option needs a published value.
PUBLISHED = {
    "model.base": "CompVis/stable-diffusion-v1-4",
    "model.revision": None,
    "model.start_from": None,
    "model.lora_rank": 4,
    "model.lora_alpha": None,
    "model.lora_targets": None,
    "model.text_lora": "refuse",
    "model.vae": None,
    "model.allow_distilled": False,
    "model.dtype": "fp16",
    "model.drop_t5": False,
    "model.quantise": None,
    "model.tf32": True,
    "rollout.samples_per_epoch": 8 * 8 * 4,  # GPUs x batch x batches
    "rollout.steps": 50,
    "rollout.guidance_scale": 5.0,
    "rollout.eta": 1.0,
    "rollout.dynamics": None,  # of flow-matching models, as the two below
    "rollout.noise_level": None,
    "rollout.window": None,
    "rollout.images_per_prompt": None,  # of GRPO, as the three of the algorithm below
    "rollout.negative_prompt": "",
    "reward.zoo": None,
    "reward.checkpoints": {},
    "reward.normalise": "per-prompt",
    "reward.scale_only": False,
    "reward.buffer_size": 32,
    "reward.min_count": 16,
    "reward.clip_range": 0.0,
    "algorithm.name": "tdpo-r",
    "algorithm.gamma": 1.0,
    "algorithm.advantage_norm": "global",
    "algorithm.advantage_std": "group",
    "algorithm.advantage_clip": 5.0,
    "algorithm.guard": False,
    "algorithm.critic_coef": 1.0,
    "algorithm.critic_dropout": True,
    "algorithm.critic_activation": "none",
    "algorithm.critic_steps": 1,
    "algorithm.critic_init_std": None,  # 1/(E+1)
    "algorithm.reset_every": 10,
    "algorithm.reset_target": "active",
    "algorithm.dormant_threshold": 0.0,
    "algorithm.extra_dormant_threshold": None,
    "algorithm.neuron_rows": 8 * 8,  # GPUs x batch
    "algorithm.reference": False,
    "algorithm.kl_penalty": "clip",
    "algorithm.kl_penalty_coef": 0.0,
    "algorithm.init_kl_coef": 0.2,
    "algorithm.kl_target": None,
    "update.kl_coef": 0.0,  # neither a KL term in the loss nor a moving average
    "update.kl_kind": "prediction",
    "update.ema_decay": 0.0,
    "update.ema_every": 8,
    "algorithm.kl_horizon": 2000,
    "algorithm.update_mode": "per-timestep",
    "update.batch_size": 8 * 1 * 16,  # GPUs x batch x accumulation
    "update.inner_epochs": 1,
    "update.learning_rate": 1e-4,
    "update.critic_learning_rate": 1e-4,
    "update.optimizer": "adamw",
    "update.adam_beta1": 0.9,
    "update.adam_beta2": 0.999,
    "update.adam_weight_decay": 1e-4,
    "update.adam_epsilon": 1e-8,
    "update.max_grad_norm": 1.0,
    "update.clip_range": 1e-4,
    "update.clip_range_critic": 0.2,
    "update.timestep_fraction": 1.0,
    "update.shuffle_samples": True,
    "update.shuffle_timesteps": True,
    "update.guidance": True,
    "run.epochs": 100,
    "run.seed": 42,
    "run.save_every": 1,
    "run.keep_last": None,
    "run.stop_on_overoptimisation": None,
    "run.trackers": [],
}
DIFFERENT = {
    "aesthetic": ("simple-animals", ["imagereward", "pickscore", "hpsv2"]),
    "pickscore": ("simple-animals", ["hpsv2", "imagereward", "aesthetic"]),
    "hpsv2": ("hpsv2:photo", ["pickscore", "imagereward", "aesthetic"]),
    "imagereward": ("simple-animals", ["pickscore", "hpsv2", "aesthetic"]),  # ours, after aesthetic
}
OURS = {
    "rollout.eval_prompts",
    "run.preview_images",
    "run.micro_batch",
    "run.memory_limit",
    "run.cache_limit",
    "run.compile",
    "run.max_bad_steps",
}  # nothing published, nothing that trains


def flat(preset):
    return {f"{section}.{key}": value for section, keys in preset.as_dict().items() for key, value in keys.items()}


@pytest.mark.parametrize("name", DIFFERENT)
def test_preset_holds_the_published_numbers(name):
    prompt_source, watched = DIFFERENT[name]
    expected = PUBLISHED | {"rollout.prompts": prompt_source, "reward.train": name, "reward.watch": watched}
    ours = flat(presets.load(name))
    # a setting that came later has its default, which changes nothing
    default = flat(presets.Preset())
    assert {key: value for key, value in ours.items() if key not in OURS and (key in expected or value != default[key])} == expected


@pytest.mark.parametrize("name", DIFFERENT)
def test_preset_file_is_short_and_says_its_key_numbers(name):
    text = (presets.folder() / f"{name}.toml").read_text()
    assert len(text.splitlines()) <= 40
    said = {f"{section}.{key}" for section, keys in tomllib.loads(text).items() for key in keys}
    key_numbers = "rollout.samples_per_epoch rollout.steps update.batch_size update.clip_range algorithm.reset_every run.epochs run.seed"
    assert said >= set(key_numbers.split())


@pytest.mark.parametrize("name", DIFFERENT)
def test_held_out_prompts_are_other_prompts(name):
    rollout = presets.load(name).rollout
    assert rollout.eval_prompts and rollout.eval_prompts != rollout.prompts
    assert rollout.eval_prompts in prompts.SOURCES


def test_every_shipped_preset_has_held_out_prompts():
    assert all(presets.load(name).rollout.eval_prompts for name in presets.names())


def test_held_out_animals_are_not_among_the_45():
    trained, held_out = prompts.load("simple-animals"), prompts.load("simple-animals:held-out")
    assert (len(trained), len(set(trained))) == (45, 45)
    assert len(held_out) == len(set(held_out)) >= 8
    assert not set(trained) & set(held_out)


# --- the dry run ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DIFFERENT)
def test_dry_run_prints_the_published_sizes(name):
    facts = json.loads(tdpo("train", "--preset", name, "--dry-run", "--json").out)
    assert facts["samples_per_epoch"] == 256
    assert facts["effective_batch"] == 128
    assert facts["updates_per_epoch"] == 100
    assert facts["reward_queries"] == 25_600
    assert facts["preset"] == presets.load(name).as_dict()
    assert facts["per_device"]["1"]["samples"] == 256
    assert facts["per_device"]["8"]["samples"] == 32
    assert facts["per_device"]["8"]["samples_per_optimizer_step"] == 16
    # SD 1.x in fp16 is 2 GB, what four guided samples keep for the backward pass another 8; scorers wait in main memory
    assert 10e9 < facts["per_device"]["8"]["peak_memory_bytes"] < facts["peak_memory_bytes"] < 16e9


def test_dry_run_shows_shares_and_memory_to_people():
    said = tdpo("train", "--preset", "hpsv2", "--dry-run").err
    assert re.search(r"on 1 device +256 samples, 128 per optimizer step, about \d+\.\d GB\n", said)
    assert re.search(r"on each of 8 +32 samples, 16 per optimizer step, about \d+\.\d GB\n", said)
    assert "25,600" in said and "100 per epoch" in said


@pytest.mark.parametrize("algorithm", ["ddpo", "tdpo"])
def test_baselines_are_one_flag_away(algorithm):
    facts = json.loads(tdpo("train", "--preset", "hpsv2", "--algorithm", algorithm, "--dry-run", "--json").out)
    assert facts["preset"]["algorithm"]["name"] == algorithm
    assert facts["updates_per_epoch"] == 100


@pytest.mark.slow
def test_dry_run_imports_no_torch_and_writes_nothing(tmp_path):
    program = (
        "import sys; sys.argv = ['tdpo', 'train', '--preset', 'hpsv2', '--dry-run', '--json']\n"
        "from tdpo_cli import cli\n"
        "try: cli.main()\n"
        "finally: print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'diffusers', 'transformers', 'numpy')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert not list(tmp_path.iterdir())
