"""tdpo score: any image, any source of prompts, interruptions, several processes, bad input; nothing is lost."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import tdpo
from PIL import Image, PngImagePlugin

from tdpo_cli.rewards import LEARNED
from tdpo_cli.score import images, listing

FUNCTIONS = """
import os, time, torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def length(images, prompts):
    return [len(prompt) for prompt in prompts]

def undefined_when_dark(images, prompts):
    mean = images.mean(dim=(1, 2, 3))
    return torch.where(mean < 0.1, float("nan"), mean)

def slow(images, prompts):
    time.sleep(0.2)
    return images.mean(dim=(1, 2, 3))

def broken(images, prompts):
    raise KeyError("colour")

def dies_on_white(images, prompts):
    if images.mean() > 0.99:
        os._exit(9)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def my(tmp_path):
    """Names of the rewards above."""
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return lambda name: f"{path}:{name}"


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two sizes in two folders, their names in order of brightness."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i in range(12):
        size = (20, 16) if i % 3 else (16, 16)
        Image.new("RGB", size, (20 * i,) * 3).save(root / ("more" if i > 7 else ".") / f"{i:02d}.png")
    return root


def rows_of(path):
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(newline="")))
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what comes out -----------------------------------------------------------------------------------------------------
def test_rows_are_in_name_order_with_the_functions_numbers(folder, my, tmp_path):
    out = tmp_path / "scores.jsonl"
    name = my("brightness")
    result = tdpo("score", folder, "--rewards", f"{name},jpeg-compressibility", "--prompt", "grey", "--out", out, "--json")
    assert result.status == 0, result.err
    rows = rows_of(out)
    assert [row["image"] for row in rows] == [*(f"{i:02d}.png" for i in range(8)), *(f"more/{i:02d}.png" for i in range(8, 12))]
    assert list(rows[0]) == ["image", "prompt", name, "jpeg-compressibility"]
    assert {row["prompt"] for row in rows} == {"grey"}
    assert [row[name] for row in rows] == pytest.approx([20 * i / 255 for i in range(12)], abs=1e-6)
    report = json.loads(result.out)
    assert report["images"] == 12
    one = report["rewards"][name]
    assert one["count"] == 12 and one["missing"] == 0
    assert one["mean"] == pytest.approx(110 / 255) and one["quantiles"]["0.5"] == pytest.approx(110 / 255)
    assert one["best"][0]["image"] == "more/11.png" and one["worst"][0] == {"image": "00.png", "score": 0.0}


def test_csv_holds_the_same_numbers(folder, my, tmp_path):
    for suffix in ("jsonl", "csv"):
        assert tdpo("score", folder, "--rewards", my("brightness"), "--out", tmp_path / f"s.{suffix}").status == 0
    lines, cells = rows_of(tmp_path / "s.jsonl"), rows_of(tmp_path / "s.csv")
    assert [float(row[my("brightness")]) for row in cells] == [row[my("brightness")] for row in lines]
    assert {row["prompt"] for row in cells} == {""} and {row["prompt"] for row in lines} == {None}


def test_meta_says_how_the_scores_were_made(folder, tmp_path):
    out = tmp_path / "deep" / "scores.csv"
    assert tdpo("score", folder, "--rewards", "aesthetic", "--zoo", "sandbox", "--variant", "package", "--out", out).status == 0
    meta = json.loads((tmp_path / "deep" / "scores.meta.json").read_text())["rewards"]["aesthetic"]
    assert meta["variant"] == "package" and meta["checkpoint"].endswith("zoo/aesthetic")
    assert all(len(digest) == 64 for digest in meta["sha256"].values()) and meta["preprocessing"]["size"] and meta["scale"]


def test_table_for_people_names_best_and_worst(folder, my, tmp_path):
    shown = tdpo("score", folder, "--rewards", my("brightness"), "--out", tmp_path / "s.jsonl").err
    assert "best" in shown and "more/11.png (0.8627)" in shown and "worst" in shown and "mean" in shown


@pytest.mark.slow
def test_all_four_rewards_of_the_sandbox(folder, tmp_path):
    out = tmp_path / "s.jsonl"
    result = tdpo("score", folder, "--rewards", "all", "--zoo", "sandbox", "--prompt", "a red circle on a blue background", "--out", out)
    assert result.status == 0, result.err
    assert list(rows_of(out)[0]) == ["image", "prompt", *LEARNED]
    assert all(isinstance(row[name], float) for row in rows_of(out) for name in LEARNED)


def test_half_precision_prints_its_difference(folder, tmp_path):
    arguments = ["--rewards", "aesthetic,jpeg-compressibility", "--zoo", "sandbox", "--dtype", "bf16", "--out", tmp_path / "s.jsonl", "--json"]
    result = tdpo("score", folder, *arguments)
    difference = json.loads(result.out)["half_precision_difference"]
    assert list(difference) == ["aesthetic"] and 0 < difference["aesthetic"]["max"] < 0.5


# --- images -------------------------------------------------------------------------------------------------------------
GREY = {  # 60 % grey in many ways of storing it
    "rgb.png": Image.new("RGB", (9, 7), (153,) * 3),
    "grey.png": Image.new("L", (9, 7), 153),
    "sixteen.png": Image.fromarray(np.full((7, 9), 153 * 257, dtype=np.uint16)),
    "sixteen.tif": Image.fromarray(np.full((7, 9), 153 * 257, dtype=np.uint16)),
    "integer.tif": Image.fromarray(np.full((7, 9), 153 * 257, dtype=np.int32)),
    "float.tif": Image.fromarray(np.full((7, 9), 0.6, dtype=np.float32)),
    "palette.gif": Image.new("RGB", (9, 7), (153,) * 3).quantize(4),
    "cmyk.tif": Image.new("CMYK", (9, 7), (102, 102, 102, 0)),
    "half.png": Image.new("RGBA", (9, 7), (0, 0, 0, 102)),
    "half_grey.png": Image.new("LA", (9, 7), (0, 102)),
    "half.webp": Image.new("RGBA", (9, 7), (0, 0, 0, 102)),
    "upper.JPEG": Image.new("L", (9, 7), 153),
}


@pytest.mark.parametrize("name", GREY)
def test_every_format_is_the_same_grey(name, tmp_path):
    GREY[name].save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    pixels = images.read(tmp_path / name)
    assert pixels.shape == (3, 7, 9) and pixels.dtype == torch.uint8
    assert (pixels.float() - 153).abs().max() <= 1
    assert listing.find(tmp_path).names == [name]


def test_transparent_palette_shows_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert (images.read(tmp_path / "a.png") == 255).all()


def test_exif_turns_the_image_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert images.read(tmp_path / "a.jpg").shape == (3, 30, 10)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(images.UnreadableImage, match="bomb"):
        images.read(tmp_path / "a.png")


def test_unreadable_image_gets_nulls_after_all_others_are_scored(folder, my, tmp_path):
    (folder / "03.png").write_bytes((folder / "04.png").read_bytes()[:60])
    (folder / "05.png").write_text("no image")
    out = tmp_path / "s.jsonl"
    result = tdpo("score", folder, "--rewards", f"{my('brightness')},{my('length')}", "--prompt", "x", "--out", out, "--json")
    assert result.status == 1 and "03.png" in result.err and "05.png" in result.err and "Traceback" not in result.err
    rows = {row["image"]: row for row in rows_of(out)}
    assert len(rows) == 12
    assert [name for name, row in rows.items() if row[my("brightness")] is None] == ["03.png", "05.png"]
    assert {problem["image"] for problem in json.loads(result.out)["problems"]} == {"03.png", "05.png"}
    again = tdpo("score", folder, "--rewards", f"{my('brightness')},{my('length')}", "--prompt", "x", "--out", out)
    assert again.status == 1 and rows_of(out) == list(rows.values())


# --- prompts ------------------------------------------------------------------------------------------------------------
def prompts_of(folder, my, *arguments):
    out = folder.parent / f"p{len(list(folder.parent.glob('p*.jsonl')))}.jsonl"
    result = tdpo("score", folder, "--rewards", my("length"), "--out", out, *arguments)
    assert result.status == 0, result.err
    rows = rows_of(out)
    assert [row[my("length")] for row in rows] == [len(row["prompt"]) for row in rows]
    return {row["image"]: row["prompt"] for row in rows}


def test_prompts_from_text_files_and_png_chunks(folder, my):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "from the chunk")
    for path in folder.rglob("*.png"):
        Image.open(path).save(path, pnginfo=info)
    (folder / "02.txt").write_text("from beside\n")
    found = prompts_of(folder, my)
    assert found.pop("02.png") == "from beside" and set(found.values()) == {"from the chunk"}


def test_prompts_file_by_line_and_by_name(folder, my, tmp_path):
    names = listing.find(folder).names
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(12)) + "\n\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"image": name, "text": f"for {name}"}) + "\n" for name in reversed(names)))
    (tmp_path / "c.csv").write_text("file_name,prompt\n" + "".join(f'{name},"a, b"\n' for name in names))
    assert list(prompts_of(folder, my, "--prompts", tmp_path / "a.txt").values()) == [f"line {i}" for i in range(12)]
    assert prompts_of(folder, my, "--prompts", tmp_path / "b.jsonl") == {name: f"for {name}" for name in names}
    assert set(prompts_of(folder, my, "--prompts", tmp_path / "c.csv").values()) == {"a, b"}


def test_metadata_names_exactly_what_is_scored_and_is_overridden(folder, my):
    (folder / "metadata.jsonl").write_text('{"file_name": "more/09.png", "text": "nine"}\n{"file_name": "01.png", "text": ""}\n')
    (folder / "01.txt").write_text("not this")
    assert prompts_of(folder, my) == {"01.png": "", "more/09.png": "nine"}
    assert prompts_of(folder, my, "--prompt", "all") == {"01.png": "all", "more/09.png": "all"}


def test_metadata_names_a_file_that_is_not_there(folder, my, tmp_path):
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n{"file_name": "01.png", "text": "y"}\n')
    result = tdpo("score", folder, "--rewards", my("length"), "--out", tmp_path / "s.jsonl")
    assert result.status == 1 and "gone.png: cannot be read: no such file" in result.err
    assert [row[my("length")] for row in rows_of(tmp_path / "s.jsonl")] == [1.0, None]


# --- wrong requests -----------------------------------------------------------------------------------------------------
def refused(*arguments, status=2):
    result = tdpo("score", *arguments)
    assert result.status == status and "Traceback" not in result.err, result.err
    return result.err


@pytest.mark.slow
def test_wrong_requests_are_refused_with_one_message(folder, my, tmp_path):
    bright = ("--rewards", my("brightness"))
    assert "no such folder" in refused(tmp_path / "nowhere", *bright)
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(tmp_path / "empty", *bright)
    assert "Did you mean aesthetic?" in refused(folder, "--rewards", "astetic")
    assert "pickscore need a prompt" in refused(folder, "--rewards", "aesthetic,pickscore", "--zoo", "sandbox")
    assert "12 of 12" in refused(folder, "--rewards", "pickscore", "--zoo", "sandbox")
    assert ".jsonl or .csv" in refused(folder, *bright, "--out", "scores.txt")
    assert "cannot be written" in refused(folder, *bright, "--out", folder / "00.png" / "s.jsonl")
    assert "exclude each other" in refused(folder, *bright, "--prompt", "a", "--prompts", "b.txt")
    assert "no such prompt file" in refused(folder, *bright, "--prompts", "b.txt")
    assert "tdpo or package" in refused(folder, *bright, "--variant", "paper")
    assert "expected fp32" in refused(folder, *bright, "--dtype", "int8")
    assert "not among --rewards" in refused(folder, *bright, "--checkpoint", "hpsv2=x")
    assert "--device quantum" in refused(folder, *bright, "--device", "quantum")


@pytest.mark.parametrize("count", [11, 13])
def test_wrong_number_of_prompts(folder, my, tmp_path, count):
    (tmp_path / "p.txt").write_text("word\n" * count)
    assert f"{count} prompts for 12 images" in refused(folder, "--rewards", my("length"), "--prompts", tmp_path / "p.txt")


@pytest.mark.slow
def test_prompts_for_unknown_images_and_damaged_prompt_files(folder, my, tmp_path):
    for text, message in [
        ('{"image": "x.png", "prompt": "a"}\n', "1 images that are not in"),
        ('{"image": "00.png", "prompt": 3}\n', "line 1: the prompt is not a string"),
        ('{"image": "00.png", "prompt": "a"}\n{"image": "00.png", "prompt": "b"}\n', "00.png has two prompts"),
        ('{"prompt": "a"}\n', "line 1: no image named"),
        ("{\n", "line 1: not valid JSON"),
        ('{"image": "00.png", "prompt": "a"}\n', "11 of 12 have none: 01.png"),
    ]:
        (tmp_path / "p.jsonl").write_text(text)
        assert message in refused(folder, "--rewards", my("length"), "--prompts", tmp_path / "p.jsonl")


@pytest.mark.slow
def test_missing_and_wrong_checkpoints_are_named(folder, tmp_path):
    words = ("--rewards", "hpsv2", "--prompt", "x", "--checkpoint")
    message = refused(folder, *words, f"hpsv2={tmp_path / 'weights'}")
    assert "HPS_v2_compressed.pt" in message and "hf download xswu/HPSv2" in message
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "HPS.pt")
    assert "missing keys" in refused(folder, *words, f"hpsv2={tmp_path / 'HPS.pt'}")
    torch.save({"state_dict": subprocess.Popen}, tmp_path / "evil.pt")
    assert "weights_only=True" in refused(folder, *words, f"hpsv2={tmp_path / 'evil.pt'}")
    message = refused(folder, "--rewards", "hpsv2", "--prompt", "x")
    assert "HF_HUB_OFFLINE" in message and "hf download" in message


def test_nan_is_null_and_reported(folder, my, tmp_path):
    result = tdpo("score", folder, "--rewards", f"{my('undefined_when_dark')},{my('brightness')}", "--out", tmp_path / "s.csv")
    assert result.status == 1 and "00.png" in result.err and "gave nan" in result.err
    rows = rows_of(tmp_path / "s.csv")
    assert [row[my("undefined_when_dark")] for row in rows][:2] == ["", ""] and rows[11][my("undefined_when_dark")]
    assert all(row[my("brightness")] for row in rows)


def test_failing_function_is_one_message(folder, my, tmp_path):
    assert "broken failed on" in refused(folder, "--rewards", my("broken"), "--out", tmp_path / "s.jsonl", status=1)


# --- interrupted, continued, shared -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_continued_file_equals_an_uninterrupted_one(folder, my, tmp_path, suffix):
    prompt = 'two\nlines, "quoted" \u00e9'
    arguments = ["--rewards", f"{my('brightness')},aesthetic", "--zoo", "sandbox", "--prompt", prompt, "--batch-size", "1"]
    whole, torn = tmp_path / f"whole.{suffix}", tmp_path / f"torn.{suffix}"
    assert tdpo("score", folder, *arguments, "--out", whole).status == 0
    content = whole.read_bytes()
    (tmp_path / "torn.meta.json").write_bytes((tmp_path / "whole.meta.json").read_bytes())
    for cut in (0, 3, len(content) // 3, len(content) // 2, len(content) * 3 // 4, len(content) - 1, len(content)):
        torn.write_bytes(content[:cut])
        result = tdpo("score", folder, *arguments, "--out", torn, "--json")
        assert result.status == 0, result.err
        assert torn.read_bytes() == content
        breaks = content[:cut].count(b"\n")  # in csv one of the header, then two a row
        whole_rows = breaks if suffix == "jsonl" else (breaks - 1) // 2
        assert json.loads(result.out)["continued_from"] == (12 if cut == len(content) else max(0, whole_rows) // 4 * 4)


@pytest.mark.slow
def test_file_made_otherwise_is_not_continued(folder, my, tmp_path):
    out = tmp_path / "s.jsonl"
    assert tdpo("score", folder, "--rewards", my("brightness"), "--out", out).status == 0
    before = out.read_bytes()
    assert "rewards:" in refused(folder, "--rewards", "jpeg-compressibility", "--out", out)
    assert "prompts have changed" in refused(folder, "--rewards", my("brightness"), "--prompt", "x", "--out", out)
    (folder / "12.png").write_bytes((folder / "01.png").read_bytes())
    assert "images: 12, now 13" in refused(folder, "--rewards", my("brightness"), "--out", out)
    assert out.read_bytes() == before
    (tmp_path / "s.meta.json").unlink()
    assert "s.meta.json" in refused(folder, "--rewards", my("brightness"), "--out", out)


@pytest.mark.slow
def test_stopped_run_keeps_its_rows_and_goes_on(folder, my, tmp_path):
    out, whole = tmp_path / "s.jsonl", tmp_path / "whole.jsonl"
    arguments = ["score", str(folder), "--rewards", my("slow"), "--batch-size", "1", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "tdpo_cli", *arguments, str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and "Traceback" not in process.stderr.read()
    assert 0 < len(rows_of(out)) < 12
    assert tdpo(*arguments, out).status == 0 and tdpo(*arguments, whole).status == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_write_the_same_file(folder, my, tmp_path):
    (folder / "06.png").write_bytes(b"damaged")
    arguments = ["--rewards", f"{my('brightness')},aesthetic", "--zoo", "sandbox", "--batch-size", "1", "--out"]
    assert tdpo("score", folder, *arguments, tmp_path / "one.jsonl").status == 1
    result = tdpo("score", folder, *arguments, tmp_path / "two.jsonl", "--processes", "2")
    assert result.status == 1 and "06.png" in result.err, result.err
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_dying_process_is_reported_and_its_rows_are_scored_later(folder, my, tmp_path):
    Image.new("RGB", (16, 16), "white").save(folder / "more" / "11.png")
    arguments = ["--rewards", my("dies_on_white"), "--batch-size", "1", "--out", tmp_path / "s.jsonl", "--processes", "2"]
    result = tdpo("score", folder, *arguments)
    assert result.status == 1 and "processes died" in result.err
    Image.new("RGB", (16, 16), (220,) * 3).save(folder / "more" / "11.png")
    assert tdpo("score", folder, *arguments).status == 0
    assert len(rows_of(tmp_path / "s.jsonl")) == 12


@pytest.mark.slow
def test_memory_is_flat_over_5000_images(tmp_path):
    peaks = {}
    for count in (500, 5000):
        root = tmp_path / str(count)
        root.mkdir()
        for i in range(count):
            side = 128 + 32 * (i % 3)
            pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{i:05d}.png", compress_level=0)
        program = (
            "import sys, resource; from tdpo_cli import cli\n"
            "try: cli.main()\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        arguments = ["score", str(root), "--rewards", "aesthetic,jpeg-compressibility", "--zoo", "sandbox", "--out", str(root / "s.jsonl"), "-q"]
        done = subprocess.run([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True, env={**os.environ}, check=True)
        peaks[count] = int(done.stderr.split()[-1]) / 1024
    print(f"\npeak memory, MiB: {peaks}")
    assert peaks[5000] < 1.1 * peaks[500]
