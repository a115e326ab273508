"""Facts about picture folders of strangers: nothing runs, nothing hangs, nothing outside is read, one bad image costs its own row."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import tdpo
from PIL import Image, PngImagePlugin

from tdpo_cli.errors import RequestError
from tdpo_cli.score import ahead, captions, images, png_text
from tdpo_cli.score.score_file import ScoreFile
from tdpo_cli.storage import outside

JPEG = ("--rewards", "jpeg-compressibility")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "red").save(root / f"{name}.png")
    return root


def rewards_file(folder, text):
    file = folder.parent / "r.py"
    file.write_text(text)
    return file


def score(folder, *arguments, status=0):
    """-> the rows, and what was said"""
    out = folder.parent / "s.jsonl"
    done = tdpo("score", folder, *arguments, "--out", out)
    assert done.status == status and "Traceback" not in done.err, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {row["image"]: row for row in rows}, done.err


# --- what is opened -----------------------------------------------------------------------------------------------------
def test_postscript_under_an_images_name_never_reaches_another_program(folder, tmp_path, monkeypatch):
    (folder / "photo.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin/gs"
    gs.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    rows, said = score(folder, *JPEG, status=1)
    assert not (tmp_path / "called").exists() and "photo.png: cannot be read: no image of a format that is read" in said
    assert rows["photo.png"]["jpeg-compressibility"] is None and rows["a.png"]["jpeg-compressibility"]


def test_pipes_and_folders_with_an_images_name_are_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    rows, said = score(folder, *JPEG, status=1)
    assert "pipe.png: cannot be read: not a regular file" in said and rows["pipe.png"]["jpeg-compressibility"] is None
    os.mkfifo(folder / "a.txt")
    assert "a.txt: cannot be read as UTF-8 text: not a regular file" in score(folder, *JPEG, status=2)[1]
    assert "not a regular file" in score(folder, *JPEG, "--prompts", folder / "a.txt", status=2)[1]


def test_an_image_above_the_limit_costs_its_own_row(folder, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 1000)
    Image.new("1", (40, 40)).save(folder / "large.png")
    rows, said = score(folder, *JPEG, status=1)
    assert "large.png: cannot be read: too large: 40 x 40, more than 1,000 pixels" in said and rows["b.png"]["jpeg-compressibility"]


def test_an_image_that_a_reward_cannot_take_costs_its_own_row(folder):
    Image.new("1", (70_000, 1)).save(folder / "wide.png")
    rows, said = score(folder, *JPEG, status=1)
    assert "wide.png: jpeg-compressibility failed: " in said and rows["wide.png"]["jpeg-compressibility"] is None
    file = rewards_file(
        folder,
        "def f(images, prompts):\n    if (images.amin(dim=(1, 2, 3)) == 1).any(): raise KeyError('white')\n    return images.mean(dim=(1, 2, 3))\n",
    )
    Image.new("RGB", (16, 16), "white").save(folder / "b.png")
    (folder / "wide.png").unlink()
    (folder.parent / "s.jsonl").unlink()
    Image.new("RGB", (16, 16), "black").save(folder / "c.png")
    rows, _ = score(folder, "--rewards", f"{file}:f", status=1)
    assert [row[f"{file}:f"] is None for row in rows.values()] == [False, True, False]


def test_a_subfolder_that_cannot_be_read_and_what_is_left_out_is_named(folder, monkeypatch):
    (folder / "sub").mkdir()
    real = os.scandir

    def closed(place):
        if str(place).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", closed)
    (folder / "x.psd").touch()
    (folder / "elsewhere").symlink_to(folder.parent)
    said = score(folder, *JPEG)[1]
    assert "sub: left out, it cannot be read: Permission denied" in said
    assert "1 linked folders are left out: elsewhere" in said and "1 files of other formats are left out: x.psd" in said


# --- what lies outside ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_links_and_names_that_leave_the_folder_need_a_word(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("SECRET")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    rows, said = score(folder, *JPEG, status=2)
    assert "a.txt lead out of it by links" in said and "--follow-links" in said and rows == {}
    assert score(folder, *JPEG, "--follow-links")[0]["a.png"]["prompt"] == "SECRET"
    (folder / "a.txt").unlink()
    (folder / "b.png").rename(tmp_path / "x.png")
    (folder / "b.png").symlink_to(tmp_path / "x.png")
    assert "1 images lie outside it, by their names or by links: b.png" in score(folder, *JPEG, status=2)[1]
    (folder / "b.png").unlink()
    for name in ("../x.png", str(tmp_path / "x.png"), "c/../../x.png"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
        assert "lie outside it" in score(folder, *JPEG, status=2)[1]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").symlink_to(tmp_path / "secret.txt")
    assert "metadata.jsonl lead out" in score(folder, *JPEG, status=2)[1]
    (folder / "metadata.jsonl").unlink()
    (folder / "b.png").symlink_to("a.png")  # inside
    (folder.parent / "s.jsonl").unlink()
    assert list(score(folder, *JPEG)[0]) == ["a.png", "b.png"]


def test_names_that_are_no_utf8_are_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / os.fsdecode(b"\xff.png")).write_bytes((folder / "a.png").read_bytes())
    done = tdpo("score", folder, *JPEG)
    assert done.status == 2 and "1 names are not UTF-8 text: '\\udcff.png'" in done.err and not (tmp_path / "scores").exists()


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2100])
def test_names_that_no_file_can_have_are_refused(folder, name):
    for arguments in ([name, *JPEG], [folder, *JPEG, "--out", f"{name}.jsonl"], [folder, *JPEG, "--prompts", f"{name}.txt"]):
        done = tdpo("score", *arguments)
        assert done.status == 2 and "Traceback" not in done.err


# --- prompts inside PNGs --------------------------------------------------------------------------------------------------
GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "seed": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": " a red fox ", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
}
FLUX = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0]}},
    "2": {"class_type": "BasicGuider", "inputs": {"conditioning": ["3", 0]}},
    "3": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["4", 0], "guidance": 3.5}},
    "4": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "fox", "t5xxl": ["5", 0]}},
    "5": {"class_type": "PrimitiveString", "inputs": {"value": "a fox in snow"}},
}
TWO = {**GRAPH, "8": {"inputs": {"positive": ["9", 0]}}, "9": {"inputs": {"text": "a blue fox"}}}
LOOP = {"1": {"inputs": {"positive": ["2", 0]}}, "2": {"inputs": {"conditioning": ["1", 0]}}}


@pytest.mark.parametrize(
    "info, prompt",
    [
        ({"parameters": "a fox, (red:1.2)\nsecond line\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a"}, "a fox, (red:1.2)\nsecond line"),
        ({"parameters": "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7"}, "a fox"),
        ({"parameters": "Negative prompt: blurry\nSteps: 20, Sampler: Euler a"}, None),
        ({"parameters": "[red:blue:0.5] fox"}, "[red:blue:0.5] fox"),
        ({"parameters": "a fox that is blurry"}, "a fox that is blurry"),
        ({"prompt": "a plain one"}, "a plain one"),
        ({"prompt": json.dumps(GRAPH)}, "a red fox"),
        ({"prompt": json.dumps(FLUX)}, "fox"),
        ({"prompt": json.dumps({**FLUX, "4": {"inputs": {"t5xxl": ["5", 0]}}})}, "a fox in snow"),
        ({"prompt": json.dumps(TWO)}, None),
        ({"prompt": json.dumps(TWO), "parameters": "a fox\nSteps: 2, x"}, "a fox"),
        ({"prompt": json.dumps(LOOP)}, None),
        ({"prompt": json.dumps({"1": {"inputs": 3}, "2": 4})}, None),
        ({"parameters": json.dumps({"sui_image_params": {"prompt": "a fox"}})}, "a fox"),
        ({"prompt": "[" * 100_000}, None),
        ({"prompt": "", "parameters": b"bytes"}, None),
    ],
)  # fmt: skip
def test_the_positive_prompt_is_found_or_nothing(info, prompt):
    assert png_text.prompt_of(info) == prompt


def test_a_workflow_is_no_prompt(folder):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    Image.open(folder / "a.png").save(folder / "a.png", pnginfo=info)
    assert score(folder, *JPEG)[0]["a.png"]["prompt"] == "a red fox"


# --- reading ahead --------------------------------------------------------------------------------------------------------
def test_reading_ahead_keeps_to_its_budget_and_order():
    lock, under_way, peak = threading.Lock(), [0], [0]

    def work(item):
        with lock:
            under_way[0] += item
            peak[0] = max(peak[0], under_way[0])
        time.sleep(0.001)
        return item

    items = [3, 1, 9, 2, 2, 2, 7, 1, 1, 1, 1, 1, 30, 1, 1] * 4
    got = []
    for item in ahead.in_order(work, items, 4, cost=lambda item: item, budget=10):
        got.append(item)
        with lock:
            under_way[0] -= item
    assert got == items and peak[0] <= 30  # 30 alone


def test_an_error_and_a_read_without_end_are_not_waited_for():
    forever = threading.Event()
    with pytest.raises(ZeroDivisionError):
        list(ahead.in_order(lambda item: 1 / item if item < 5 else forever.wait(), [1, 0, 7, 8, 9], 2))
    stream = ahead.in_order(lambda item: item or forever.wait(), [1, 0, 0], 1)
    assert next(stream) == 1
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 1


@pytest.mark.slow
def test_one_ctrl_c_ends_a_read_that_hangs(folder):
    program = (
        "import os, signal, sys, threading; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tdpo_cli.score import captions\n"
        "captions._header = lambda path: os.write(1, b'reads\\n') and threading.Event().wait()\n"
        f"sys.argv = ['tdpo', 'score', {str(folder)!r}, '--rewards', 'jpeg-compressibility']\n"
        "from tdpo_cli.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "reads\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


# --- the file of scores ---------------------------------------------------------------------------------------------------
def test_a_second_process_on_one_file_is_refused_and_new_names_differ(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ScoreFile.taken(None, "pictures", ["x"]) as first, ScoreFile.taken(None, "pictures", ["x"]) as second:
        first.path.write_text("x"), second.path.write_text("x")
        assert (first.path.name, second.path.name) == ("pictures-0001.jsonl", "pictures-0002.jsonl")
        done = tdpo("score", folder, *JPEG, "--out", first.path)
        assert done.status == 2 and "another tdpo process is writing this file" in done.err


def test_a_refused_request_leaves_no_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = rewards_file(folder, "def f(images, prompts):\n    return [1]\n")
    assert tdpo("score", folder, "--rewards", f"{file}:g").status == 2
    assert tdpo("score", folder, "--rewards", f"{file}:g", "--out", tmp_path / "deep/er/s.csv").status == 2
    assert not (tmp_path / "scores").exists() and not (tmp_path / "deep").exists()


def test_csv_with_long_prompts_and_carriage_returns_goes_on(folder, tmp_path):
    (folder / "a.txt").write_text("x" * 140_000)
    (folder / "c\rd.png").write_bytes((folder / "a.png").read_bytes())
    for _ in range(2):
        done = tdpo("score", folder, *JPEG, "--out", tmp_path / "s.csv")
        assert done.status == 0, done.err
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c\rd.png"] and len(rows[0]["prompt"]) == 140_000


def test_files_of_both_suffixes_share_their_settings(folder, tmp_path):
    assert tdpo("score", folder, *JPEG, "--out", tmp_path / "s.csv").status == 0
    assert tdpo("score", folder, *JPEG, "--out", tmp_path / "s.jsonl").status == 0
    (tmp_path / "s.jsonl").unlink()
    done = tdpo("score", folder, *JPEG, "--prompt", "x", "--out", tmp_path / "s.jsonl")
    assert done.status == 2 and "s.meta.json belongs to" in done.err and not (tmp_path / "s.jsonl").exists()


# --- custom rewards -------------------------------------------------------------------------------------------------------
def test_a_reward_that_changes_its_images_changes_no_other_score(folder):
    file = rewards_file(folder, "def f(i, p):\n    i.zero_()\n    i.add_(0.5)\n    print('noise')\n    return i.mean(dim=(1, 2, 3))\n")
    alone = score(folder, *JPEG)[0]["a.png"]["jpeg-compressibility"]
    (folder.parent / "s.jsonl").unlink()
    done = tdpo("score", folder, "--rewards", f"{file}:f,jpeg-compressibility", "--out", folder.parent / "s.jsonl", "--json")
    assert json.loads(done.out)["rewards"]["jpeg-compressibility"]["best"][0]["score"] == alone  # and its print did not break the JSON


@pytest.mark.parametrize(
    "text, status, message",
    [
        ("import sys\ndef f(i, p): sys.exit(0)", 1, "it called sys.exit(0)"),
        ("import sys; sys.exit(3)", 2, "it called sys.exit(3)"),
        ("import sys\ndef f(i, p):\n    sys.stdout.close()\n    return [1.0] * len(i)", 0, "images in"),
        ("def f(i, p): return (i.mean(dim=(1, 2, 3)) * 1j)", 2, "complex"),
    ],
)  # fmt: skip
def test_rewards_that_exit_or_close_standard_output(folder, text, status, message):
    file = rewards_file(folder, text)
    assert message in score(folder, "--rewards", f"{file}:f", status=status)[1]


# --- reward weights with a config ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tower, key, value, message",
    [
        ("text_cfg", "hf_model_name", "owner/name", "hf_model_name names files outside"),
        ("text_cfg", "bpe_path", "/etc/passwd", "bpe_path names files outside"),
        ("vision_cfg", "timm_model_name", "hf-hub:owner/name", "timm_model_name names files outside"),
        ("vision_cfg", "layers", 10**9, "layers is 1000000000"),
        ("text_cfg", "tokenizer_kwargs", {"bpe_path": "x"}, "tokenizer_kwargs is"),
        ("text_cfg", "hf_tokenizer_name", "here", "auto_map names Python code to run"),
    ],
)  # fmt: skip
def test_an_open_clip_config_that_names_code_or_other_files_is_refused(folder, root, tmp_path, tower, key, value, message):
    source = root / "tdpo_cli/sandbox/zoo/hpsv2"
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"][tower][key] = value
    (tmp_path / "w").mkdir()
    (tmp_path / "w/open_clip_config.json").write_text(json.dumps(config))
    shutil.copyfile(source / "HPS_v2_compressed.pt", tmp_path / "w/HPS_v2_compressed.pt")
    (tmp_path / "w/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    said = score(folder, "--rewards", "hpsv2", "--prompt", "x", "--checkpoint", f"hpsv2={tmp_path / 'w'}", status=2)[1]
    assert message in said


# --- fuzz -----------------------------------------------------------------------------------------------------------------
SEEDS = {
    ".jsonl": b'{"file_name": "a.png", "prompt": "a fox"}\n{"image": "b.png", "text": "b \\u00e9"}\n',
    ".csv": b'file_name,prompt\na.png,"a, ""fox"""\nb.png,b\n',
    ".txt": b"a fox\nb\n",
}
ROWS = {
    ".jsonl": b'{"image": "a.png", "prompt": "a", "x": 0.5}\n{"image": "b.png", "prompt": null, "x": null}\n',
    ".csv": b'image,prompt,x\na.png,"a\nb",0.5\nb.png,,\n',
}
META = b'{"images": 2, "list_sha256": "0", "dtype": "fp32", "rewards": {"x": {"checkpoint": null, "sha256": {"f": "0"}, "variant": "tdpo"}}}\n'
PIECES = (
    b"\xff", b"\0", b"\r", b"\n", b'"', b"{", b"[" * 2000, b"9" * 5000, b"1e999", b"NaN", b"\\ud800", b"null", b"[]", b"{}", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"x" * 140_000, b"-1", b"true", b",", b'"image": 3', b"../", b"/", b"..", b".", b"\\u0000", b":",
)  # fmt: skip


def mutated(draw, content):
    for _ in range(draw.randint(1, 4)):
        place, end = draw.randint(0, len(content)), draw.randint(0, 12)
        kind = draw.randint(0, 3)
        piece = (b"", draw.choice(PIECES), bytes([draw.randint(0, 255)]), content[place : place + end] * 2)[kind]
        content = content[:place] + piece + content[place + end :]
    return content


def readings(folder, draw, count):
    """Read mutated files with every reader of `score`. -> how many were refused; anything but RequestError comes through"""
    refused, meta = 0, json.loads(META)
    meta["rewards"]["x"]["preprocessing"] = {}
    for number in range(count):
        suffix = draw.choice(list(SEEDS))
        try:
            if number % 3 == 0 and suffix != ".txt":
                file = ScoreFile(folder.parent / f"rows{suffix}", ["x"])
                file.path.write_bytes(mutated(draw, ROWS[suffix]))
                file.meta_path.write_bytes(draw.choice((META, mutated(draw, META))))
                file.begin(meta, ["a.png", "b.png"], 1)
                list(file.read())
            elif number % 3 == 1:
                (folder / "metadata.jsonl").write_bytes(mutated(draw, SEEDS[".jsonl"]))
                captions.collect(folder, None, None)
            else:
                (folder / "metadata.jsonl").unlink(missing_ok=True)
                prompts = folder.parent / f"prompts{suffix}"
                prompts.write_bytes(mutated(draw, SEEDS[suffix]))
                assert len(captions.collect(folder, None, prompts).items) == 2
        except RequestError:
            refused += 1
    return refused


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_tables_are_read_or_refused(folder, count):
    refused = readings(folder, random.Random(1), count)
    print(f"\n{count} readings, {refused} refused, 0 exceptions of another kind")
    assert 0 < refused < count


def test_text_chunks_never_raise():
    draw = random.Random(2)
    for content in (json.dumps(GRAPH).encode(), json.dumps(FLUX).encode(), b"a\nNegative prompt: b\nSteps: 20, x"):
        for _ in range(150):
            prompt = png_text.prompt_of({"prompt": mutated(draw, content).decode("utf-8", errors="surrogateescape")})
            assert prompt is None or outside.is_text(prompt)


@pytest.mark.slow
def test_gpu_that_is_lost_leaves_no_nulls(folder, monkeypatch):
    if not hasattr(torch, "AcceleratorError"):
        pytest.skip("this torch has no AcceleratorError")

    class Lost(torch.AcceleratorError):
        def __init__(self):
            Exception.__init__(self, "device-side assert")

    def lost(self, images, prompts):
        raise Lost

    monkeypatch.setattr("tdpo_cli.rewards.simple.JpegSize.score", lost)
    rows, said = score(folder, *JPEG, status=1)
    assert rows == {} and "reward jpeg-compressibility failed: Lost" in said
