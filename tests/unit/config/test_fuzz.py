"""Facts about mutated files from outside: each is read or refused with a RequestError, and what is accepted can be written down again.

Plain random mutation with a seed, without torch: 500 files in the fast tests, 10,000 in the slow ones.
"""

import json
import random
import sys

import pytest

from tdpo_cli.config import preset as presets
from tdpo_cli.config import prompts
from tdpo_cli.cross_eval.folder import Folder
from tdpo_cli.errors import RequestError
from tdpo_cli.storage.run_dir import Manifest, RunDir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COUNTS = [500, pytest.param(10_000, marks=pytest.mark.slow)]
ODD = [
    None, True, -1, 0, 10**30, 2**63, 1e308, -0.5, float("nan"), float("inf"), "", "none", "\x00", "\x1b[31m", "\ud800", "🌲", "x" * 5000, [], {},
    [[]], {"": ""}, {"\u2028": "\x7f"}, ["\x85"], "../..", "sandbox", "a:b", 10**400,
]  # fmt: skip
RAW = [
    b"\xff",
    b"\x00",
    b'"',
    b"[" * 3000,
    b"{",
    b"}",
    b"\n",
    b"\r",
    b",",
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"\xed\xa0\x80",
    "🌲".encode(),
    b"\\ud800",
    b"=",
]


def mutated_value(draw, value):
    """The value or one part of it, replaced, removed or added to."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if how < 0.2:
            return {**value, draw.choice([key + "s", "", "\x1b", "\ud800", "x" * 9000]): value[key]}
        return {**value, key: mutated_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return [*value[:at], mutated_value(draw, value[at]), *value[at + 1 :]]
    return draw.choice(ODD)


def mutated_bytes(draw, content):
    """The bytes with a few of them flipped, cut out, doubled, or something odd put in."""
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        at = draw.randrange(len(content) + 1)
        how = draw.random()
        if how < 0.3 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        elif how < 0.5:
            content = content[:at] + content[at + draw.randrange(30) :]
        elif how < 0.6:
            content = content[: at + draw.randrange(200)] + content[at:]
        else:
            content = content[:at] + draw.choice(RAW) + content[at:]
    return content


def in_sparse_toml(table):
    return "\n".join(line for line in presets.as_toml(table).splitlines() if not line.startswith("#"))


@pytest.fixture(scope="module")
def shipped():
    """Each as the content of preset.json, and as a preset file."""
    found = [presets.load(name) for name in presets.names()]
    return [(preset.as_dict(), in_sparse_toml(preset).encode()) for preset in found]


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_presets_are_read_or_refused(count, shipped, tmp_path):
    draw, accepted = random.Random(0), 0
    for number in range(count):
        table, content = draw.choice(shipped)
        file = tmp_path / draw.choice(("any.json", "any.toml"))
        if file.suffix == ".json":
            for _ in range(draw.choice((0, 1, 1, 2))):
                table = mutated_value(draw, table)
            content = json.dumps(table).encode()
        file.write_bytes(mutated_bytes(draw, content) if draw.random() < 0.5 else content)
        try:
            read = presets.load(str(file))
        except RequestError as error:
            assert str(error), number
            continue
        except Exception as error:
            raise AssertionError(f"number {number}: {file.read_bytes()[:2000]!r}") from error
        accepted += 1
        assert presets.from_dict(tomllib.loads(presets.as_toml(read)), "again") == read, number
        json.dumps(read.as_dict()).encode("utf-8")
    assert count / 20 < accepted < count * 0.95


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_prompt_files_are_read_or_refused(count, tmp_path):
    draw, accepted = random.Random(1), 0
    texts = {
        ".txt": b"a red circle\n\na cat, black\na \xc3\xa9\n",
        ".jsonl": b'{"prompt": "a red circle", "seed": 3}\n{"prompt": "a cat \\u00e9"}\n',
        ".csv": b'prompt,seed\na red circle,3\n"a cat, ""black""",4\n',
    }
    for number in range(count):
        suffix = draw.choice(list(texts))
        file = tmp_path / f"any{suffix}"
        content = texts[suffix]
        if suffix == ".jsonl" and draw.random() < 0.5:
            content = "\n".join(json.dumps(mutated_value(draw, {"prompt": "a", "seed": 1})) for _ in range(2)).encode()
        file.write_bytes(mutated_bytes(draw, content))
        try:
            read = prompts.load(str(file))
        except RequestError as error:
            assert str(error).startswith(f"{file}: "), number
            continue
        except Exception as error:
            raise AssertionError(f"number {number}: {file.read_bytes()[:2000]!r}") from error
        accepted += 1
        assert read and all(prompt.strip() == prompt != "" for prompt in read), number
        "".join(read).encode("utf-8")
    assert count / 20 < accepted < count * 0.95


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_run_folders_are_read_or_refused(count, tmp_path, shipped):
    draw, run, accepted = random.Random(2), RunDir(tmp_path), 0
    plan = {"micro_batch": 4, "sample_batch": 8, "decode_chunk": 8, "park": True}
    row = {"epoch": 0, "rewards/gold/mean": 0.5, "rewards/gold/std": 0.1, "steps/ratio_mean": [1.0, None]}
    whole = {
        "preset.json": shipped[0][0],
        "env.json": [{"first_epoch": 0, "micro_batch": 4, "plan": plan, "versions": {"torch": "2"}}],
        "metrics.jsonl": row,
        "manifest.json": {"epoch": 3, "preset": "0" * 64, "settings": "1" * 64, "files": {"state.pt": "2" * 64}},
    }
    sampling = {
        "base": "sandbox", "revision": None, "dtype": "fp32", "start_from": "run/checkpoints/epoch_0001", "resolution": [64, 64], "steps": 4,
        "guidance_scale": 5.0, "noise": None, "negative_prompt": "",
    }  # fmt: skip
    model = {
        "name": "run/epoch_0001", "base": "base", "run": "run", "epoch": 1, "group": "run", "algorithm": "tdpo", "trained_reward": "gold",
        "reward_queries": 8, "updates": 2, "sampling": sampling, "sha256": {"a": "0"}, "weights": {"gold": 1.0}, "constraints": ["safety"],
    }  # fmt: skip
    whole["request.json"] = {"seed": 0, "per_prompt": 2, "batch_size": 4, "prompts": ["a", "b"], "rewards": {"gold": None}, "models": [model]}
    whole["parts/base/00000.json"] = {"scores": {"gold": [[1.0, None], [0.5, 2]]}, "distances": [0.1, 0.2]}
    (tmp_path / "parts/base").mkdir(parents=True)
    folder = Folder(tmp_path)
    readers = {
        "request.json": folder.read_request, "parts/base/00000.json": lambda: folder.read_parts("base", whole["request.json"], 2),
        "preset.json": run.read_preset, "env.json": run.read_environments, "metrics.jsonl": lambda: run.read_metrics(["gold"]),
        "manifest.json": lambda: Manifest.read(tmp_path),
    }  # fmt: skip
    for number in range(count):
        name = draw.choice(list(whole))
        content = json.dumps(mutated_value(draw, whole[name]) if draw.random() < 0.7 else whole[name]).encode() + b"\n"
        (tmp_path / name).write_bytes(mutated_bytes(draw, content))
        try:
            readers[name]()
            accepted += 1
        except RequestError as error:
            assert str(error), number
        except Exception as error:
            raise AssertionError(f"number {number}, {name}: {content[:2000]!r}") from error
    assert count / 20 < accepted < count * 0.95
