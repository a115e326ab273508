"""Facts about wrong requests: the answer comes before the heavy libraries are imported, whatever is wrong."""

import json
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "numpy")
TIMES = 3  # at most so much more processor time than `tdpo --help`


PROGRAM = f"""
import contextlib, io, json, os, sys
from pathlib import Path
from tdpo_cli.cli import main
listing = lambda: sorted(map(str, Path().rglob("*")))
for arguments in json.load(sys.stdin):
    out, err, before, loaded = io.StringIO(), io.StringIO(), listing(), set(sys.modules)
    sys.argv, status = ["tdpo", *arguments], None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules and name not in loaded]
    print(json.dumps([status, out.getvalue(), err.getvalue(), heavy, before == listing()]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """All wrong requests, one after the other in one process. -> arguments -> status, output, errors, heavy libraries it loaded, folder untouched"""
    asked = json.dumps([arguments for arguments, _ in WRONG])
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=asked, capture_output=True, text=True, cwd=furnished(tmp_path_factory.mktemp("place"))
    )
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(found) == len(WRONG), process.stderr
    return {arguments: answer for (arguments, _), answer in zip(WRONG, found, strict=True)}


def furnished(tmp_path):
    """A folder with an image, a run without checkpoints, samples, a file of LoRA weights (never read), and things that are in the way."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    (tmp_path / "run").mkdir()
    preset = {"model": {"base": "sandbox"}, "rollout": {"eval_prompts": "sandbox:held-out"}, "reward": {"train": "gold"}}
    (tmp_path / "run/preset.json").write_text(json.dumps(preset))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/metadata.jsonl").touch()
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / "taken.safetensors").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").touch()
    return tmp_path


@pytest.fixture
def place(tmp_path):
    return furnished(tmp_path)


CROSS_EVAL = ("cross-eval", "base", "--prompts", "sandbox")
WRONG = [
    # rewards
    (("train", "--set", "reward.train=nonsense"), "unknown reward 'nonsense'."),
    (("train", "--set", "reward.watch=gold,asthetic"), "unknown reward 'asthetic'. Did you mean aesthetic?"),
    (("train", "--checkpoint", "nonsense=x"), "unknown reward 'nonsense'."),
    (("train", "--set", "reward.train=nonsense", "--dry-run"), "unknown reward 'nonsense'."),
    (("score", "images", "--rewards", "nonsense"), "unknown reward 'nonsense'."),
    (("score", "images", "--rewards", ","), "--rewards ',': no reward named"),
    ((*CROSS_EVAL, "--rewards", "x"), "unknown reward 'x'."),
    # trackers
    (("train", "--tracker", "wandbb"), "--set: run.trackers: unknown tracker 'wandbb'. Did you mean wandb?"),
    # prompts
    (("train", "--set", "rollout.prompts=simple-animal"), "unknown prompt source 'simple-animal'. Did you mean simple-animals?"),
    (("train", "--set", "rollout.eval_prompts=sandbox:other"), "unknown prompt source 'sandbox:other'."),
    (("train", "--set", "rollout.prompts=hpsv2:fotos"), "unknown prompt source hpsv2:fotos. Did you mean hpsv2:photo?"),
    (("train", "--set", "rollout.eval_prompts=none.txt"), "none.txt: no such prompt file."),
    (("sample", "base", "none.txt"), "none.txt: no such prompt file."),
    (("score", "images", "--prompts", "none.jsonl"), "none.jsonl: no such prompt file."),
    (("cross-eval", "base", "--prompts", "none.csv"), "none.csv: no such prompt file."),
    (("cross-eval", "base", "--prompts", "nonsense"), "unknown prompt source 'nonsense'."),
    (("score", "images", "--prompt", "a cat", "--prompts", "none.txt"), "--prompt and --prompts exclude each other"),
    # presets and settings
    *(
        ((*command, "--preset", "quikstart"), "unknown preset 'quikstart'. Did you mean quickstart?")
        for command in (("train",), ("sample", "base", "a cat"), CROSS_EVAL, ("doctor",))
    ),
    *(
        ((*command, "--set", setting), message)
        for command in (("train",), ("sample", "base", "a cat"), CROSS_EVAL)
        for setting, message in (
            ("rollout.stepps=3", "--set: unknown key rollout.stepps. Did you mean rollout.steps?"),
            ("rollout.steps=few", '--set: rollout.steps: expected a whole number, got "few"'),
        )
    ),
    (("score", "images", "--variant", "mine"), "--variant mine: expected tdpo or package."),
    (("score", "images", "--dtype", "fp8"), "--dtype fp8: expected fp32, fp16, bf16."),
    (("score", "images", "--zoo", "sandbx"), "--zoo sandbx: expected sandbox."),
    (("export", "lora.safetensors", "--format", "webui"), "--format webui: unknown format. Known: kohya."),
    # what is not there
    (("score", "nowhere"), "nowhere: no such folder."),
    (("report", "nowhere"), "nowhere: no run there"),
    (("train", "--resume", "--out", "nowhere"), "nowhere: no run there"),
    *(
        (command, f"{where}: {what}")
        for where, what in (("./nowhere", "no such checkpoint, run or model folder"), ("run", "no checkpoint there yet."))
        for command in (("sample", where, "a cat"), ("cross-eval", where), ("export", where, "--format", "kohya"))
    ),
    (("sample", "base", "a cat", "--epoch", "3"), "--epoch chooses a checkpoint of a run folder, and base is none."),
    (("cross-eval", "base", "--epoch", "3"), "--epoch chooses checkpoints of run folders, and base is none."),
    # what is in the way
    (("train", "--out", "run"), "run already holds a run."),
    (("sample", "base", "a cat", "--out", "samples"), "samples already holds samples; choose another --out."),
    (("score", "images", "--out", "scores.txt"), "--out scores.txt: expected a file that ends in .jsonl or .csv."),
    ((*CROSS_EVAL, "--out", "thesis"), "thesis holds other things; choose another --out."),
    (("export", "lora.safetensors", "--format", "kohya", "--out", "taken.safetensors"), "taken.safetensors exists already; choose another --out."),
    # among several workers too
    (("sample", "./nowhere", "a cat", "--processes", "2"), "./nowhere: no such checkpoint"),
    (("train", "--out", "run", "--processes", "2"), "run already holds a run."),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_wrong_request_is_answered_before_torch_is_imported(arguments, message, answers):
    status, out, err, heavy, untouched = answers[arguments]
    assert (status, out) == (2, "") and err.removeprefix("tdpo: ").splitlines()[0].startswith(message), err
    assert heavy == []
    assert untouched


def seconds(*arguments, cwd):
    """Processor time of the command: the least of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tdpo_cli", *arguments], capture_output=True, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(spent)


@pytest.mark.slow
def test_the_answer_takes_little_more_time_than_the_help(place):
    of_help = seconds("--help", cwd=place)
    wrong = (
        ("train", "--set", "reward.train=nonsense"), ("score", "images", "--rewards", "nonsense"), (*CROSS_EVAL, "--rewards", "x"),
        ("sample", "./nowhere", "a cat"), ("export", "./nowhere", "--format", "kohya"), ("score", "nowhere"),
    )  # fmt: skip
    slow = {" ".join(arguments): spent / of_help for arguments in wrong if (spent := seconds(*arguments, cwd=place)) > TIMES * of_help}
    assert slow == {}
