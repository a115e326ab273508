"""Facts about runs shared by several processes: the same run, whoever does the work."""

import json

import pytest
import spy
from helpers import tdpo
from tolerances import NOT_COMPARED, assert_same_run

from tdpo_cli.config import preset as presets

pytestmark = pytest.mark.slow  # whole runs; test_sharing.py holds the same on a policy of four weights

PRESET = """
[model]
base = "sandbox"
lora_rank = 4
dtype = "fp32"

[rollout]
prompts = "sandbox"
samples_per_epoch = 16
steps = 6                   # sampling in very few amplifies rounding
guidance_scale = 3.0

[reward]
train = "aesthetic"
watch = ["gold"]
zoo = "sandbox"

[algorithm]
critic_init_std = 0.11
reset_every = 2
reset_target = "all"        # which neurons are dormant can hang on the last bit, and with it every draw of the reset

[update]
batch_size = 8
learning_rate = 1.5e-3      # the quickstart's
critic_learning_rate = 1e-3
max_grad_norm = 3e-3
clip_range = 0.5            # far out, and the critic's off: at a clip range the gradient jumps, and the last bit decides a whole pair
clip_range_critic = 0.0

[run]
epochs = 3
seed = 1
preview_images = 1
"""
OPTIMIZER_STEPS = 12  # an epoch: 6 steps x 2 batches
A_HANDFUL = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "tiny.toml").write_text(PRESET)
    return folder


def workers(nursery, place, name, *arguments):
    """`tdpo train` into place/NAME in a process of its own, whose workers are spied on. -> what each of them saw"""
    (place / f"{name}-seen").mkdir()
    arguments = ("train", "--preset", place / "tiny.toml", "--out", place / name, "--json", *arguments)
    done = nursery.tdpo(*arguments, SPY_FOLDER=str(place / f"{name}-seen"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(place / name), "one JSON object, from the main process alone"
    return [json.loads(file.read_text()) for file in sorted((place / f"{name}-seen").iterdir())]


@pytest.fixture(scope="module")
def alone(place):
    """Three epochs in one process."""
    with pytest.MonkeyPatch.context() as patch:
        seen = spy.install(patch.setattr)
        outcome = tdpo("train", "--preset", place / "tiny.toml", "--out", place / "alone")
    assert outcome.status == 0, outcome.err
    return seen


@pytest.fixture(scope="module")
def two(nursery, place):
    """Two epochs in two processes, with a micro-batch that divides nothing."""
    return workers(nursery, place, "two", "--processes", 2, "--epochs", 2, "--set", "run.micro_batch=3")


@pytest.fixture(scope="module")
def resumed(place, two):
    """The third epoch of the same run, in one process."""
    outcome = tdpo("train", "--resume", "--out", place / "two", "--epochs", 3)
    assert outcome.status == 0, outcome.err
    return place / "two"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours, theirs, place):
    """Columns that both rows have: a worker's row as the spy saw it lacks timings."""
    compared = lambda row: {key: value for key, value in row.items() if not key.startswith(NOT_COMPARED)}
    assert_same_run(compared(ours), compared(theirs), presets.load(str(place / "tiny.toml")))


def test_prompts_noise_and_shuffles_are_exactly_equal(alone, two):
    for worker in two:
        for ours, theirs in zip(alone["epochs"], worker["epochs"], strict=False):
            assert {key: ours[key] for key in ("prompts", "sample_ids", "plans")} == {key: theirs[key] for key in ("prompts", "sample_ids", "plans")}
    for ours, first, second in zip(alone["epochs"], *(worker["epochs"] for worker in two), strict=False):
        assert ours["x_T"] == first["x_T"] | second["x_T"]


def test_each_process_holds_the_latents_that_it_sampled_and_sends_none(two):
    first, second = two
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert len(ours["x_T"]) == len(theirs["x_T"]) == 8 and not ours["x_T"].keys() & theirs["x_T"].keys()
    assert [worker["collectives"]["isend"] for worker in two] == [0, 0]


def test_one_process_and_two_agree(alone, two, place):
    ours, theirs = rows(place / "alone"), two[0]["epochs"]
    assert len(theirs) == 2
    for epoch in range(2):
        assert_same(ours[epoch], theirs[epoch]["row"], place)


def test_a_run_resumed_in_another_number_of_processes_is_the_same_run(alone, resumed, place):
    assert [entry["world_size"] for entry in json.loads((resumed / "env.json").read_text())] == [2, 1]
    assert {entry["micro_batch"] for entry in json.loads((resumed / "env.json").read_text())} == {3}
    ours, theirs = rows(place / "alone"), rows(resumed)
    assert [row["epoch"] for row in theirs] == [0, 1, 2]
    assert_same(ours[2], theirs[2], place)


def test_every_process_holds_the_same_weights_and_the_same_numbers(two):
    first, second = two
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert ours["weights"] == theirs["weights"]
        assert ours["row"] == theirs["row"]


def test_one_gradient_reduction_per_optimizer_step_and_a_handful_more(alone, two):
    assert sum(alone["collectives"].values()) == 0
    for worker in two:
        first, second = (epoch["collectives"] for epoch in worker["epochs"])
        print(f"collectives an epoch: {second - first}, of which {OPTIMIZER_STEPS} sum gradients; in all {worker['collectives']}")
        assert OPTIMIZER_STEPS < second - first <= OPTIMIZER_STEPS + A_HANDFUL


def test_only_the_main_process_writes_and_the_log_has_each_line_once(two, place):
    assert len(rows(place / "two")) >= 2
    log = (place / "two" / "log.txt").read_text()
    assert log.count("0/1 ") == log.count("1/1 ") == 1


def test_four_processes_agree_too(alone, nursery, place):
    seen = workers(nursery, place, "four", "--processes", 4, "--set", "run.micro_batch=1")
    for ours, theirs in zip(rows(place / "alone"), rows(place / "four"), strict=True):
        assert_same(ours, theirs, place)
    assert len({worker["epochs"][-1]["weights"] for worker in seen}) == 1


def test_a_sharded_run_is_the_same_run_and_resumes_whole(alone, two, nursery, place):
    workers(nursery, place, "sharded", "--processes", 2, "--epochs", 2, "--set", "run.micro_batch=3", "--set", "run.shard=on")
    for ours, theirs in zip(rows(place / "two")[:2], rows(place / "sharded"), strict=True):
        assert_same(ours, theirs, place)
    names = [{file.name for file in (place / run / "checkpoints" / "epoch_0001").iterdir()} for run in ("two", "sharded")]
    assert names[0] == names[1]
    outcome = tdpo("train", "--resume", "--out", place / "sharded", "--epochs", 3, "--set", "run.shard=off")
    assert outcome.status == 0, outcome.err
    assert_same(rows(place / "alone")[2], rows(place / "sharded")[2], place)


def test_a_sharded_network_fits_a_view_where_one_process_reads_files_first(nursery, place):
    settings = ("algorithm.critic_view=rgb", "run.shard=on", "run.micro_batch=3")
    arguments = ("train", "--preset", place / "tiny.toml", "--processes", 2, "--epochs", 1, "--out", place / "fitted")
    chosen = [part for setting in settings for part in ("--set", setting)]
    done = nursery.tdpo(*arguments, *chosen, worker="worker.py", HF_HUB_OFFLINE="0", TDPO_TIMEOUT="2")
    assert done.returncode == 0, done.stderr
    assert len(rows(place / "fitted")) == 1
