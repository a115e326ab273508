"""Facts about whole runs: `tdpo train` and `tdpo sample` on the sandbox's networks, through the real command line."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from helpers import tdpo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tolerances import log_prob_error

from tdpo_cli.config import preset as presets
from tdpo_cli.models import settings
from tdpo_cli.randomness import Randomness
from tdpo_cli.sandbox import ZOO

CHANGES = {
    "rollout__samples_per_epoch": 8, "rollout__steps": 3, "rollout__guidance_scale": 3.0,
    "reward__train": "aesthetic", "reward__watch": ["gold"], "reward__min_count": 16,
    "update__batch_size": 4, "update__critic_learning_rate": 1e-3, "update__clip_range": 1e-2,
    "update__learning_rate": 5e-3,  # high, so that two epochs show in the images
    "run__epochs": 2, "run__seed": 1, "run__preview_images": 2,
}  # fmt: skip
UPDATES_PER_EPOCH = 3 * 2  # steps x batches
PROMPTS = ["a red circle on a blue background", "a cyan ring on a black background"]
LORA = "pytorch_lora_weights.safetensors"

CONTRACT_KEYS = {
    "epoch", "reward_queries", "rewards/aesthetic/mean", "rewards/aesthetic/std", "rewards/gold/mean", "rewards/gold/std",
    "policy_loss", "critic_loss", "approx_kl", "policy_clip_fraction", "critic_clip_fraction", "policy_grad_norm", "critic_grad_norm",
    "critic_explained_variance", "ratio_drift", "updates", "skipped_steps", "dormant_fraction", "reset", "mean_kl",
    "seconds/rollout", "seconds/score", "seconds/update", "seconds/total", "images_per_second", "peak_memory_bytes",
}  # fmt: skip
CONTRACT_KEYS |= {"kl_loss", "ema"}  # of version 0.2
STEPS = {"steps/ratio_mean", "steps/ratio_std", "steps/clip_fraction"}  # lists, an entry per trained step
MORE_KEYS = {"agreement", "overflowed_steps", "dormant_overlap", "dormant_fraction_extra"} | STEPS  # beyond the contract
OF_THE_CRITIC = {
    "critic_loss",
    "critic_clip_fraction",
    "critic_grad_norm",
    "critic_explained_variance",
    "dormant_fraction",
    "reset",
    "dormant_overlap",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny.preset(folder, **CHANGES)
    return folder


@pytest.fixture(scope="module")
def train(place):
    """Train the tiny preset into place/NAME. -> the run folder"""

    def run(name, *arguments):
        outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", place / name, *arguments)
        assert outcome.status == 0, outcome.err
        return place / name

    return run


@pytest.fixture(scope="module")
def straight(train):
    """Two epochs of TDPO-R in one go; the tests below only read it."""
    return train("straight")


@pytest.fixture(scope="module")
def resumed(train):
    """The same in two halves."""
    run = train("resumed", "--epochs", 1)
    outcome = tdpo("train", "--resume", "--out", run, "--epochs", 2, "--json")
    assert outcome.status == 0, outcome.err
    return run


@pytest.fixture(scope="module")
def samples(straight, place):
    """Images of the trained policy without noise in the steps; eta 0 is what plain diffusers does."""
    outcome = tdpo("sample", straight, *PROMPTS, "--eta", 0, "--per-prompt", 2, "--seed", 5, "--steps", 4, "--out", place / "samples")
    assert outcome.status == 0, outcome.err
    return place / "samples"


def weights(run, epoch=1):
    folder = run / f"checkpoints/epoch_{epoch:04d}"
    return {**load_file(folder / LORA), **load_file(folder / "critic.safetensors")}


def same(one, other):
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pictures(folder):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(folder / line["file_name"]), dtype=np.int16) for line in lines])


# --- the run folder -----------------------------------------------------------------------------------------------------
def test_the_run_folder_holds_what_the_contract_lists(straight):
    expected = {"preset.json", "env.json", "metrics.jsonl", "log.txt"}
    for epoch in ("epoch_0000", "epoch_0001"):
        expected |= {f"images/{epoch}.png", *(f"state/{epoch}/{name}" for name in ("state.pt", "metrics.jsonl", "manifest.json"))}
        expected |= {f"checkpoints/{epoch}/{name}" for name in (LORA, "critic.safetensors", "manifest.json", "README.md")}
    assert expected <= files(straight)
    assert files(straight) - expected <= {".lock", "images/before.png", "report.html"}


def test_the_recorded_preset_is_the_resolved_one(straight, place):
    resolved = presets.load(str(place / "tiny.toml"))
    resolved = settings.fit(resolved, settings.entry_of(resolved))  # with the family's own noise
    assert json.loads((straight / "preset.json").read_text()) == resolved.as_dict()


def test_the_environment_says_where_it_ran(straight):
    (entry,) = json.loads((straight / "env.json").read_text())
    assert entry["world_size"] == 1 and entry["micro_batch"] >= 1
    assert torch.__version__.startswith(entry["versions"]["torch"])  # without the build's +tag


def test_metrics_have_every_key_of_the_contract_in_every_epoch(straight):
    assert [set(row) for row in tiny.rows(straight, timings=True)] == [CONTRACT_KEYS | MORE_KEYS] * 2


def test_metrics_count_epochs_queries_and_updates(straight):
    assert [(row["epoch"], row["reward_queries"], row["updates"], row["skipped_steps"]) for row in tiny.rows(straight)] == [
        (0, 8, UPDATES_PER_EPOCH, 0), (1, 16, 2 * UPDATES_PER_EPOCH, 0),
    ]  # fmt: skip


def test_what_does_not_apply_is_null_and_nothing_else_is(straight):
    first, second = tiny.rows(straight, timings=True)
    # no reference, no second threshold, no learned reward watched, no KL term, no moving average
    unused = {"mean_kl", "dormant_fraction_extra", "agreement", "kl_loss", "ema"}
    assert {key for key, value in first.items() if value is None} == unused | {"dormant_overlap"}  # nothing to overlap with yet
    assert {key for key, value in second.items() if value is None} == unused


def test_the_first_optimizer_step_finds_the_rollouts_log_probs_again(straight):
    assert max(row["ratio_drift"] for row in tiny.rows(straight)) <= 2 * log_prob_error(tiny.SETTINGS["rollout"]["steps"])


def test_resets_happen_in_the_second_epoch_only(straight):
    first, second = tiny.rows(straight, timings=True)
    assert first["reset"] == 0
    assert second["reset"] == round(1232 * (1 - second["dormant_fraction"]))


def test_preview_images_are_labelled_grids_that_change_with_the_policy(straight):
    before, after = (Image.open(straight / f"images/{name}.png") for name in ("before", "epoch_0001"))
    assert before.size == after.size and before.width > 2 * 128
    assert np.asarray(before).tobytes() != np.asarray(after).tobytes()


def test_what_was_said_is_in_the_log(straight):
    log = (straight / "log.txt").read_text()
    assert "\n  0/1 " in log and "\n  1/1 " in log and "what to try next" in log


def test_manifests_hold_epoch_preset_and_true_hashes(straight):
    digest = presets.load(str(straight / "preset.json")).digest()
    for manifest_file in straight.glob("*/epoch_*/manifest.json"):
        manifest, folder = json.loads(manifest_file.read_text()), manifest_file.parent
        assert (f"epoch_{manifest['epoch']:04d}", manifest["preset"]) == (folder.name, digest)
        assert set(manifest["files"]) == files(folder) - {"manifest.json"}
        for name, expected in manifest["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected


def test_lora_keys_start_with_unet_and_the_critic_is_single_precision(straight):
    with safe_open(straight / "checkpoints/epoch_0001" / LORA, "pt") as file:
        assert file.keys() and all(key.startswith("unet.") for key in file.keys())
    assert {value.dtype for value in load_file(straight / "checkpoints/epoch_0001/critic.safetensors").values()} == {torch.float32}


def test_the_model_card_is_readable_markdown_with_metadata(straight):
    card = (straight / "checkpoints/epoch_0001/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "TDPO-R on aesthetic, epoch 1" in card


# --- algorithms -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ddpo_runs_without_a_critic(train):
    run = train("ddpo", "--algorithm", "ddpo")
    assert not (run / "checkpoints/epoch_0001/critic.safetensors").exists()
    assert [set(row) for row in tiny.rows(run, timings=True)] == [CONTRACT_KEYS | MORE_KEYS] * 2
    assert all(row[key] is None for row in tiny.rows(run) for key in OF_THE_CRITIC)
    assert tiny.rows(run)[0]["policy_loss"] is not None


@pytest.mark.slow
def test_tdpo_equals_tdpo_r_until_the_first_reset(train, straight):
    run = train("tdpo", "--algorithm", "tdpo", "--set", "run.preview_images=0", "--set", "run.keep_last=1")
    assert tiny.rows(run)[0] == tiny.rows(straight)[0]
    assert [row["reset"] for row in tiny.rows(run)] == [0, 0]
    trained, reset = weights(run), weights(straight)
    # the reset comes after the last update: it changes the critic alone
    assert all(trained[name].equal(reset[name]) for name in trained if name.startswith("unet."))
    assert not trained["layers.0.weight"].equal(reset["layers.0.weight"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch_0001"]


@pytest.mark.slow
def test_a_reference_gives_the_mean_kl_and_changes_nothing_else(train, straight):
    run = train("reference", "--set", "algorithm.reference=true")
    logged = [row["mean_kl"] for row in tiny.rows(run)]
    steps = tiny.SETTINGS["rollout"]["steps"]
    rounding = 2 * steps * log_prob_error(steps)  # of a sum over the steps of two log-probs' difference
    assert abs(logged[0]) <= rounding < abs(logged[1])
    assert same(weights(run), weights(straight))


# --- determinism and resuming -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_a_different_one(train, straight):
    again, other = train("again"), train("other", "--seed", 2)
    assert tiny.rows(again) == tiny.rows(straight) and same(weights(again), weights(straight))
    assert tiny.rows(other) != tiny.rows(straight)


def test_a_resumed_run_equals_the_straight_run(resumed, straight):
    assert tiny.rows(resumed) == tiny.rows(straight)
    assert same(weights(resumed), weights(straight))
    for name in ("epoch_0000", "epoch_0001", "before"):
        assert (resumed / f"images/{name}.png").read_bytes() == (straight / f"images/{name}.png").read_bytes()
    assert [entry["first_epoch"] for entry in json.loads((resumed / "env.json").read_text())] == [0, 1]


def test_resuming_a_finished_run_changes_nothing(straight):
    before = {name: (straight / name).read_bytes() for name in files(straight) - {"log.txt"}}
    outcome = tdpo("train", "--resume", "--out", straight)
    assert outcome.status == 0 and "all 2 epochs are done" in outcome.err
    assert {name: (straight / name).read_bytes() for name in files(straight) - {"log.txt"}} == before


def test_resuming_with_another_seed_is_refused_with_the_difference(straight):
    before = (straight / "preset.json").read_bytes()
    outcome = tdpo("train", "--resume", "--out", straight, "--seed", 9, "--epochs", 3, "--set", "update.learning_rate=1e-3")
    assert (outcome.status, outcome.out) == (2, "")
    assert "run.seed: the run has 1, asked for 9" in outcome.err and "update.learning_rate: the run has 0.005, asked for 0.001" in outcome.err
    assert "run.epochs:" not in outcome.err  # this one may change
    assert (straight / "preset.json").read_bytes() == before


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(straight, place):
    before = files(straight)
    outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", straight)
    assert (outcome.status, outcome.out) == (2, "")
    assert "already holds a run. Continue it with --resume, or choose another --out." in outcome.err
    assert files(straight) == before


@pytest.mark.slow
def test_a_run_that_finished_no_epoch_is_resumed_from_the_start(place, straight):
    run = place / "nothing"
    run.mkdir()
    (run / "preset.json").write_bytes((straight / "preset.json").read_bytes())
    outcome = tdpo("train", "--resume", "--out", run, "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["epochs"] == 2
    assert tiny.rows(run) == tiny.rows(straight)


def test_the_closing_report_agrees_with_the_metrics(resumed):
    report = json.loads(tdpo("train", "--resume", "--out", resumed, "--json").out)
    first, last = tiny.rows(resumed, timings=True)
    means = [row["rewards/aesthetic/mean"] for row in (first, last)]
    assert (report["rewards"]["aesthetic"]["first"], report["rewards"]["aesthetic"]["last"]) == tuple(means)
    assert report["rewards"]["aesthetic"]["rise"] == pytest.approx((means[1] - means[0]) / first["rewards/aesthetic/std"])
    assert Path(report["checkpoint"]) == resumed / "checkpoints/epoch_0001"


# --- training from a checkpoint -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_training_may_start_from_a_checkpoint(train, straight):
    start = straight / "checkpoints/epoch_0001"
    run = train("continued", "--epochs", 1, "--set", f"model.start_from={start}", "--set", "run.preview_images=0")
    assert tiny.rows(run)[0]["rewards/aesthetic/mean"] != tiny.rows(straight)[0]["rewards/aesthetic/mean"]
    # one file holds the LoRA that training started from, unchanged, and the new one behind it
    for name, value in load_file(start / LORA).items():
        both = weights(run, 0)[name]
        old, new = (both[: len(value)], both[len(value) :]) if "lora_A" in name else (both[:, : value.shape[1]], both[:, value.shape[1] :])
        assert torch.equal(old, value) and new.shape == value.shape


@pytest.mark.slow
def test_the_whole_unet_trains_saves_and_samples_too(train, place):
    run = train("whole", "--epochs", 1, "--set", "model.lora_rank=0", "--set", "run.preview_images=0")
    folder = run / "checkpoints/epoch_0000"
    assert (folder / "unet/config.json").is_file() and not (folder / LORA).exists()
    outcome = tdpo("sample", run, PROMPTS[0], "--out", place / "of-the-whole-unet")
    assert outcome.status == 0, outcome.err


# --- sampling -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_samples_come_with_metadata_and_a_grid(samples):
    lines = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    assert all({"file_name", "text"} <= set(line) for line in lines)
    assert [line["text"] for line in lines] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    listed = {line["file_name"] for line in lines}
    assert len(listed) == 4 and files(samples) == listed | {"metadata.jsonl", "grid.png", ".lock"}
    assert {Image.open(samples / name).size for name in listed} == {(32, 32)}
    assert Image.open(samples / "grid.png").width > 2 * 128


@pytest.mark.slow
def test_every_image_has_its_own_noise(samples):
    assert len({image.tobytes() for image in pictures(samples)}) == 4


@pytest.mark.slow
def test_any_batch_size_gives_the_same_images(straight, place):
    arguments = ["sample", straight, *PROMPTS, "--per-prompt", 3, "--seed", 7]
    for size in (1, 5):
        assert tdpo(*arguments, "--batch-size", size, "--out", place / f"batch-{size}").status == 0
    assert abs(pictures(place / "batch-1") - pictures(place / "batch-5")).max() <= 1
    assert tdpo(*arguments[:-1], 8, "--out", place / "seed-8").status == 0
    assert abs(pictures(place / "seed-8") - pictures(place / "batch-5")).max() > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint folder", "LoRA file", "run and --epoch"])
def test_a_checkpoint_may_be_named_in_several_ways(name, straight, samples, place):
    folder = straight / "checkpoints/epoch_0001"
    settings = ["--preset", place / "tiny.toml"]
    argument, more = {
        "checkpoint folder": (folder, []), "LoRA file": (folder / LORA, settings), "run and --epoch": (straight, ["--epoch", 1]),
    }[name]  # fmt: skip
    out = place / f"by {name}"
    outcome = tdpo("sample", argument, *PROMPTS, "--eta", 0, "--per-prompt", 2, "--seed", 5, "--steps", 4, *more, "--out", out)
    assert outcome.status == 0, outcome.err
    assert (pictures(out) == pictures(samples)).all()


@pytest.mark.slow
def test_an_earlier_epoch_gives_other_images(straight, samples, place):
    arguments = [*PROMPTS, "--eta", 0, "--per-prompt", 2, "--seed", 5, "--steps", 4, "--out", place / "epoch 0"]
    assert tdpo("sample", straight, "--epoch", 0, *arguments).status == 0
    assert abs(pictures(place / "epoch 0") - pictures(samples)).max() > 1


def test_an_epoch_without_a_checkpoint_is_refused(straight):
    outcome = tdpo("sample", straight, "a cat", "--epoch", 7)
    assert outcome.status == 2 and "no checkpoint of epoch 7. There are: epoch_0000, epoch_0001." in outcome.err


def test_a_missing_prompt_file_is_refused(straight, place):
    outcome = tdpo("sample", straight, place / "nowhere.txt", "--out", place / "refused")
    assert outcome.status == 2 and "nowhere.txt: no such prompt file." in outcome.err
    assert not (place / "refused").exists()


@pytest.mark.slow
def test_samples_are_never_overwritten(straight, samples):
    before = pictures(samples)
    outcome = tdpo("sample", straight, "a cat", "--out", samples)
    assert outcome.status == 2 and "already holds samples" in outcome.err
    assert (pictures(samples) == before).all()


@pytest.mark.slow
def test_prompts_from_standard_input_and_json_on_standard_output(straight, place):
    outcome = tdpo("sample", straight, "-", "--out", place / "stdin", "--json", "--steps", 1, stdin="a red circle\n\na blue ring\n")
    assert outcome.status == 0 and outcome.err == ""
    assert json.loads(outcome.out)["images"] == 2


# --- plain diffusers --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def diffusers_images(straight):
    """The same prompts and initial latents through diffusers alone, without and with the checkpoint's LoRA. -> two of [4,H,W,3]"""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ZOO / "pipeline", torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    latents = Randomness(5, "sample").initial_latents(0, range(4), (pipe.unet.config.in_channels, side, side))

    def images():
        prompts = [prompt for prompt in PROMPTS for _ in range(2)]
        result = pipe(prompts, num_inference_steps=4, guidance_scale=3.0, eta=0.0, latents=latents.clone(), output_type="np")
        return (result.images * 255).round().astype(np.int16)

    base = images()
    pipe.load_lora_weights(straight / "checkpoints/epoch_0001")
    return base, images()


@pytest.mark.slow
def test_plain_diffusers_loads_the_lora_and_gives_the_same_images(samples, diffusers_images):
    _, with_lora = diffusers_images
    assert abs(with_lora - pictures(samples)).max() <= 1


@pytest.mark.slow
def test_the_lora_changes_the_images(samples, diffusers_images):
    base, _ = diffusers_images
    assert abs(base - pictures(samples)).max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["base", "--preset", "TINY"], ["RUN", "--lora-scale", 0]], ids=["base", "scale 0"])
def test_the_base_model_is_plain_diffusers_base_model(arguments, straight, place, diffusers_images):
    names = {"TINY": place / "tiny.toml", "RUN": straight}
    (checkpoint, *more) = [names.get(word, word) for word in arguments]
    out = place / f"like base {more[0]}"
    outcome = tdpo("sample", checkpoint, *PROMPTS, *more, "--eta", 0, "--per-prompt", 2, "--seed", 5, "--steps", 4, "--out", out)
    assert outcome.status == 0, outcome.err
    assert abs(pictures(out) - diffusers_images[0]).max() <= 1
