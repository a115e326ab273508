"""The bad-input table: whatever is wrong with a request, one message that says what, the right exit status, no traceback.

What `test_cli` says of single options, `test_preset` of single settings, `test_sd_layouts` of model folders and `test_score` of
image folders is not repeated here.
"""

import json
import os
import shutil
import string
from pathlib import Path

import helpers
import pytest
import torch
from helpers import make_preset, tdpo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_same_run

from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.errors import RequestError
from tdpo_cli.machine import memory
from tdpo_cli.sandbox import ZOO
from tdpo_cli.score import captions
from tdpo_cli.storage.run_dir import RunDir
from tdpo_cli.train.rollout import Actor
from tdpo_cli.train.update import Learner

SMALL = {
    "model.base": "sandbox", "model.lora_rank": 2, "model.dtype": "fp32", "rollout.prompts": "sandbox", "rollout.samples_per_epoch": 4,
    "rollout.steps": 2, "rollout.guidance_scale": 1.0, "reward.train": "gold", "reward.watch": [],
    "update.batch_size": 2, "run.epochs": 1, "run.preview_images": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments, **settings):
    """A small run, `section__key=value` on top."""
    chosen = SMALL | {key.replace("__", "."): value for key, value in settings.items()}
    pairs = [word for key, value in chosen.items() for word in ("--set", f"{key}={json.dumps(value, ensure_ascii=False)}")]
    return tdpo("train", *pairs, *arguments)


def refused(outcome, status=2):
    """Its one message; nothing on standard output."""
    assert (outcome.status, outcome.out) == (status, ""), outcome.err
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("tdpo: "))
    return "\n".join(lines[first:]).removeprefix("tdpo: ")


# --- settings -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "override, message",
    [
        ("rollout.eta=0", "rollout.eta: 0.0 is out of range; it must be above 0 (DDIM noise; a policy gradient needs some)."),
        ("rollout.eta=-1", "rollout.eta: -1.0 is out of range"),
        ("update.learning_rate=-1e-4", "update.learning_rate: -0.0001 is out of range; it must be"),
        ("update.learning_rate=nan", "update.learning_rate: nan is not a finite number."),
        ("update.batch_size=7", "does not divide rollout.samples_per_epoch 48. These would: 3, 4, 6, 8."),
        ("update.batch_size=0", "update.batch_size: 0 is out of range; it must be at least 1"),
        ("update.batch_size=many", 'update.batch_size: expected a whole number, got "many" (a string).'),
        ("update.batch_size=2.5", "update.batch_size: expected a whole number, got 2.5 (a number)."),
        ("run.epochs=true", "run.epochs: expected a whole number, got true (true or false)."),
        ("run.epochs=1e3", "run.epochs: expected a whole number, got 1000.0 (a number)."),
        ("run.epochs=none", "run.epochs: expected a whole number"),
        (f"run.seed={10**30}", "is out of range."),
        (f"update.learning_rate={10**400}", "is out of range."),
        (f"run.epochs=0x{'f' * 5000}", "run.epochs: ... (a whole number) is out of range."),
        (f"run.epochs={'9' * 5000}", "run.epochs: expected a whole number"),
        ("rollout.samples_per_epoch=1000000000007", "rollout.samples_per_epoch: 1000000000007 is out of range; it must be at most 1000000"),
        (f"run.epochs={'[' * 20_000}", "run.epochs: expected a whole number"),
        ("reward.train=3", "reward.train: expected a string, got 3 (a whole number)."),
        ("reward.watch=[1]", "reward.watch: expected a list of strings, got [1] (a list)."),
        ("updates.batch_size=4", "--set: unknown key updates.batch_size. Did you mean update.batch_size?"),
        ("update=4", "--set: unknown key update."),
        ("=4", "--set: unknown key ."),
        ("update.ключ=4", "--set: unknown key update.ключ."),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_setting(override, message, elsewhere):
    assert message in refused(tdpo("train", "--set", override))
    assert list(elsewhere.iterdir()) == []


def test_a_preset_file_that_is_a_folder_or_no_text(elsewhere):
    (elsewhere / "folder.toml").mkdir()
    assert "folder.toml: no such preset file." in refused(tdpo("train", "--preset", "folder.toml"))
    for name, content in (("bytes.toml", b"\xff\xfe\x00"), ("bytes.json", b"\x80"), ("deep.json", b"[" * 200_000), ("list.json", b"[1]")):
        (elsewhere / name).write_bytes(content)
        assert refused(tdpo("train", "--preset", name)).startswith(f"{name}: ")


# --- model folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_damaged_weights_are_named_and_no_run_folder_is_made(elsewhere):
    shutil.copytree(ZOO / "pipeline", elsewhere / "modèle vide")
    weights = next((elsewhere / "modèle vide" / "unet").glob("*.safetensors"))
    whole = weights.read_bytes()
    for content in (whole[:-1000], b"\xff" + whole[1:], b"", b"no weights"):
        weights.write_bytes(content)
        assert "modèle vide" in refused(train("--out", "run", model__base="./modèle vide"))
        assert not (elsewhere / "run").exists()


# --- prompts ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "empty.txt: no prompts in it."),
        ("blank.txt", b"\n  \n\t\n", "blank.txt: no prompts in it."),
        ("latin.txt", "garçon".encode("latin-1"), "latin.txt: cannot be read as UTF-8 text"),
        ("table.csv", b"text\na cat\n", "table.csv: every row needs a `prompt`"),
        ("rows.jsonl", b'{"prompt": 3}\n', "rows.jsonl: every row needs a `prompt`"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl: not valid jsonl"),
        ("missing.txt", None, "missing.txt: no such prompt file."),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 15 else "",
)
def test_a_wrong_prompt_file_leaves_no_run_folder(name, content, message, elsewhere):
    if content is not None:
        (elsewhere / name).write_bytes(content)
    assert refused(train("--out", "run", rollout__prompts=name)).startswith(message)
    assert not (elsewhere / "run").exists()


@pytest.mark.slow
def test_prompts_longer_than_the_text_encoder_reads_are_cut_with_one_warning(elsewhere):
    long = " ".join(["a red circle on a blue background"] * 30)
    (elsewhere / "long.txt").write_text(f"{long} one\n{long} two\na red circle\n")
    outcome = train("--out", "run", rollout__prompts="long.txt", reward__train="jpeg-compressibility", run__epochs=2)
    assert outcome.status == 0, outcome.err
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: 2 prompts are longer than the text encoder reads; their ends are cut off")
    assert "Token indices" not in outcome.err


@pytest.mark.slow
def test_unicode_everywhere(elsewhere):
    (elsewhere / "подсказки.txt").write_text("猫と犬\nein Wäldchen 🌲\nقطة\n", encoding="utf-8")
    (elsewhere / "récompense.py").write_text("def größe(images, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n")
    outcome = train("--out", "läufe/первый", "--json", rollout__prompts="подсказки.txt", reward__train="récompense.py:größe", run__preview_images=2)
    assert outcome.status == 0, outcome.err
    assert "подсказки.txt" in (elsewhere / "läufe/первый/log.txt").read_text(encoding="utf-8")
    assert json.loads(tdpo("train", "--resume", "--out", "läufe/первый", "--trust-rewards", "--json").out)["trained"] == "récompense.py:größe"


# --- the run folder -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["file/run", "file", "/dev/null/run", "/proc/run"])
def test_a_place_that_cannot_be_written(place, elsewhere):
    (elsewhere / "file").write_text("")
    message = refused(train("--out", place))
    assert place in message and ("cannot be written" in message or "writing failed" in message)


def test_a_read_only_place(elsewhere):
    place = elsewhere / "read-only"
    place.mkdir()
    place.chmod(0o555)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write everywhere (root)")
    assert "cannot be written" in refused(train("--out", place / "run"))


# --- resuming -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = train("--out", folder)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def run(finished, elsewhere):
    return shutil.copytree(finished, elsewhere / "run")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--algorithm", "ddpo"], 'algorithm.name: the run has "tdpo-r", asked for "ddpo"'),
        (["--set", "model.lora_rank=4"], "model.lora_rank: the run has 2, asked for 4"),
        (["--set", "rollout.steps=3"], "rollout.steps: the run has 2, asked for 3"),
        (["--seed", 9], "run.seed: the run has 1, asked for 9"),
        (["--preset", "hpsv2"], 'model.base: the run has "sandbox", asked for '),
        (["--set", "run.micro_batch=2"], "run.micro_batch: the run has null, asked for 2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_changed_preset_is_refused_and_the_difference_said(arguments, message, run):
    said = refused(tdpo("train", "--resume", "--out", run, "--epochs", 2, *arguments))
    changeable = "run.epochs, run.save_every, run.keep_last, run.stop_on_overoptimisation, run.trackers, run.memory_limit, run.cache_limit, run.shard"
    assert f"a resumed run keeps its preset (only {changeable} may change)" in said and message in said
    assert "run.epochs: the run has" not in said


@pytest.mark.slow
def test_what_may_change_may_change(run):
    outcome = tdpo("train", "--resume", "--out", run, "--epochs", 2, "--set", "run.save_every=2", "--set", "run.keep_last=1", "--quiet")
    assert outcome.status == 0, outcome.err
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["epoch_0001"]


def test_a_state_of_another_lora_rank_is_named(run):
    recorded = json.loads((run / "preset.json").read_text())
    recorded["model"]["lora_rank"] = 4
    (run / "preset.json").write_text(json.dumps(recorded))
    before = (run / "metrics.jsonl").read_bytes()
    message = refused(tdpo("train", "--resume", "--out", run, "--epochs", 2))
    assert "preset.json: changed since epoch_0000 was saved" in message
    assert (run / "metrics.jsonl").read_bytes() == before


# --- memory -------------------------------------------------------------------------------------------------------------------
def short_of_memory(monkeypatch, most, error):
    """Rollouts of more than `most` samples at a time do not fit."""
    real, asked = Actor.rollout, []

    def tight(actor, *arguments):
        asked.append(actor.plan.sample_batch)
        if actor.plan.sample_batch > most:
            raise error
        return real(actor, *arguments)

    monkeypatch.setattr(Actor, "rollout", tight)
    return asked


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [ERRORS[0], *(pytest.param(error, marks=pytest.mark.slow) for error in ERRORS[1:])], ids=lambda error: type(error).__name__
)
def test_an_automatic_micro_batch_gets_smaller_until_it_fits(monkeypatch, error):
    asked = short_of_memory(monkeypatch, 1, error)
    outcome = train("--out", "run")
    assert outcome.status == 0, outcome.err
    assert asked == [48, 2, 1]  # there are four samples
    assert "warning: out of memory; going on from the last finished epoch with a micro-batch of 1." in outcome.err
    assert RunDir(Path("run")).read_environments()[-1]["micro_batch"] == 1


@pytest.mark.slow
def test_memory_that_runs_out_in_the_middle_of_an_epoch_costs_that_epoch_only(monkeypatch):
    real, calls = Learner.inner_epoch, []
    smooth = {"update__clip_range": 0.5, "update__clip_range_critic": 0.0}  # at a clip range the last bit decides a whole pair

    def inner_epoch(learner, *arguments):
        calls.append(learner.plan.micro_batch)
        steps = real(learner, *arguments)
        if len(calls) == 2:  # of epoch 1, after statistics were taken
            raise ERRORS[0]
        return steps

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "inner_epoch", inner_epoch)
        outcome = train("--out", "run", run__epochs=3, **smooth)
    assert outcome.status == 0, outcome.err
    rows = RunDir(Path("run")).read_metrics()
    assert [row["epoch"] for row in rows] == [0, 1, 2] and calls == [48, 48, 2, 2]
    # the epoch that was begun twice left no trace
    assert train("--out", "calm", run__epochs=3, **smooth).status == 0
    for row, calm in zip(rows, RunDir(Path("calm")).read_metrics(), strict=True):
        assert_same_run(calm, row, presets.load("calm/preset.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, most", [({"run__micro_batch": 2}, 1), pytest.param({}, 0, marks=pytest.mark.slow)], ids=["asked for", "not even one fits"]
)
def test_out_of_memory_says_what_to_lower(monkeypatch, settings, most):
    short_of_memory(monkeypatch, most, ERRORS[0])
    message = refused(train("--out", "run", **settings), status=1)
    assert message.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB\nLower, in this order: ")
    assert ("run.micro_batch=1 (it is 2; the result stays the same)" in message) is bool(settings)
    assert "rollout.samples_per_epoch" in message


def test_the_advice_fits_the_preset():
    advice = memory.advice(make_preset(model__lora_rank=0, model__dtype="fp32", reward__watch=["gold"]), 8)
    for part in ("run.micro_batch=4", "model.dtype=fp16", "model.lora_rank=4", "reward.watch"):
        assert part in advice
    assert "dtype" not in memory.advice(make_preset(), 1) and "micro_batch" not in memory.advice(make_preset(), 1)


def test_other_errors_are_no_memory_errors():
    assert not memory.exhausted(RuntimeError("shapes do not match"))
    assert all(map(memory.exhausted, ERRORS))


# --- anything at all --------------------------------------------------------------------------------------------------------
def calm(examples):
    """The same examples every time, without the slow tests a fifth of them; a slow machine is not a failure."""
    count = examples if helpers.thorough else examples // 5
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


KEYS = {section: list(keys) for section, keys in presets.Preset().as_dict().items()}

scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(0, 64) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["tdpo", "ddpo", "none", "global", "fp16", "sandbox", "gold", "aesthetic", "", "\ud800", "\x00", "a/b.txt"])
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
sections = st.sampled_from(list(KEYS)).flatmap(
    lambda section: st.tuples(st.just(section), st.dictionaries(st.sampled_from(KEYS[section]) | st.text(max_size=8), values, max_size=4) | values)
)
tables = st.lists(sections | st.tuples(st.text(max_size=8), values), max_size=4).map(dict)


def dry_run(*arguments):
    outcome = tdpo("train", *arguments, "--dry-run", "--json")
    assert outcome.status in (0, 2) and "Traceback" not in outcome.err
    if outcome.status == 0:
        resolved = json.loads(outcome.out)["preset"]
        assert presets.from_dict(resolved, "again").as_dict() == resolved  # what is accepted is accepted again
    else:
        assert outcome.out == "" and outcome.err.startswith("tdpo: ") and len(outcome.err) > len("tdpo: \n")


@pytest.mark.slow
@calm(60)
@given(tables)
def test_any_json_preset(table):
    Path("any.json").write_text(json.dumps(table))
    dry_run("--preset", "any.json")


@pytest.mark.slow
@calm(60)
@given(tables)
def test_any_toml_preset(table):
    lines = []
    for section, keys in table.items():
        lines.append(f"[{json.dumps(section)}]" if isinstance(keys, dict) else f"{json.dumps(section)} = {json.dumps(keys)}")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in keys.items()] if isinstance(keys, dict) else []
    Path("any.toml").write_text("\n".join(lines))
    dry_run("--preset", "any.toml")


@pytest.mark.slow
@calm(40)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}="\n.#,0123456789abc', max_size=60).map(str.encode), st.sampled_from(["any.toml", "any.json"]))
def test_any_bytes_as_a_preset(content, name):
    Path(name).write_bytes(content)
    dry_run("--preset", name)


@pytest.mark.slow
@calm(60)
@given(st.sampled_from([f"{s}.{k}" for s, keys in KEYS.items() for k in keys]) | st.text(max_size=12), st.text(max_size=20) | values.map(str))
def test_any_override(key, value):
    dry_run("--set", f"{key}={value}")


lines = st.lists(st.text(alphabet=string.printable + "é猫\ufeff\x00\u2028", max_size=20) | st.builds(json.dumps, tables), max_size=4)
contents = st.binary(max_size=80) | lines.map(lambda some: "\n".join(some).encode())
rows_of_prompts = st.lists(
    st.fixed_dictionaries({}, optional={"prompt": scalars, "file_name": scalars, "text": scalars, "image": scalars}), max_size=4
)
prompt_files = contents | rows_of_prompts.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


@pytest.mark.slow
@calm(200)
@given(prompt_files, st.sampled_from(["any.txt", "any.jsonl", "any.csv"]))
def test_any_prompt_file(content, name):
    Path(name).write_bytes(content)
    try:
        read = prompts.load(name)
    except RequestError as error:
        assert str(error).startswith(f"{name}: ")
    else:
        assert read and all(isinstance(prompt, str) and prompt.strip() == prompt != "" for prompt in read)


@pytest.mark.slow
@calm(200)
@given(prompt_files, st.sampled_from(["any.txt", "any.jsonl", "any.csv"]), st.booleans())
def test_any_file_of_prompts_for_scoring(content, name, as_metadata):
    folder = Path("images")
    folder.mkdir(exist_ok=True)
    for image in "ab":
        (folder / f"{image}.png").touch()
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    file = folder / "metadata.jsonl" if as_metadata else Path(name)
    file.write_bytes(content)
    try:
        items = captions.collect(folder, None, None if as_metadata else file).items
    except RequestError as error:
        assert str(error)
    else:
        assert all(item.prompt is None or isinstance(item.prompt, str) for item in items)
