"""Facts about the pages: honest axes, gaps where values are missing, text that stays text, files that ask for nothing."""

import base64
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers import make_preset, tdpo
from hypothesis import given, settings
from hypothesis import strategies as st
from page_examples import HOSTILE, make_cross_eval, make_run, metrics, png

from tdpo_cli.errors import RequestError, WorkError
from tdpo_cli.overoptimisation import verdict
from tdpo_cli.report import cross_eval_page, gallery, html, numbers, pictures, svg
from tdpo_cli.report import report as reporting
from tdpo_cli.report.charts import Chart, Series, line_chart

VOID = {"meta", "link", "img", "input", "br"}


class Document(HTMLParser):
    """What a browser would find: elements with their attributes and text, by class; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {[element['tag'] for element in self.open]}"
        for element in self.elements:
            element["text"] = "".join(self.words[element.pop("begin") : element.pop("end")])

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "begin": len(self.words), "end": len(self.words), **{name: value or "" for name, value in attributes}}
        assert len(attributes) == len({name for name, _ in attributes}), f"an attribute twice: {tag} {attributes}"
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "begin": 0, "end": 0, **{name: value or "" for name, value in attributes}})

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1]['tag'] if self.open else 'nothing'}"
        self.open.pop()["end"] = len(self.words)

    def handle_data(self, text):
        self.words.append(text)

    def find(self, tag, kind=None):
        return [one for one in self.elements if one["tag"] == tag and (kind is None or kind in one.get("class", "").split())]

    def text(self, tag, kind=None):
        return [one["text"].strip() for one in self.find(tag, kind)]

    def data(self, kind):
        return [json.loads(one["text"]) for one in self.find("script", kind)]


def assert_asks_for_nothing(text):
    """One file: no address outside it, and a policy that would forbid any."""
    document = Document(text)
    for element in document.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert element.get(name, "data:").startswith("data:"), f"{element['tag']} {name}={element[name][:80]}"
        assert not any(name.startswith("on") for name in element), f"{element['tag']} has a handler in an attribute"
    assert [one.get("type", "code") for one in document.find("script")].count("code") == 1
    style = document.find("style")[0]["text"]
    assert "@import" not in style and "url(" not in style and "@font-face" not in style
    policy = next(one["content"] for one in document.find("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    return document


def report(folder):
    """The page of a run folder, as text and as a document."""
    reporting.write(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, assert_asks_for_nothing(text)


# --- numbers ----------------------------------------------------------------------------------------------------------------
spans = (
    st.tuples(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
    .map(lambda pair: (pair[0], pair[0] + pair[1]))
    .filter(lambda span: span[1] - span[0] > 1e-9 * max(map(abs, span)))
)


@given(spans, st.integers(5, 9))
def test_ticks_lie_in_the_span_at_equal_distances_of_one_two_or_five(span, count):
    ticks = numbers.ticks(*span, count)
    width = span[1] - span[0]
    assert 2 <= len(ticks) <= count + 1
    assert all(span[0] - 1e-6 * width <= tick <= span[1] + 1e-6 * width for tick in ticks)
    steps = [after - before for before, after in pairwise(ticks)]
    assert max(steps) - min(steps) < 1e-3 * width
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - wanted) for wanted in (1, 2, 5, 10)) < 1e-2


@given(spans)
def test_tick_labels_are_distinct_and_say_their_number(span):
    ticks = numbers.ticks(*span)
    if max(map(abs, ticks)) > 1e6 * (ticks[1] - ticks[0]):
        return  # more digits than an axis has room for
    labels, factor = numbers.tick_labels(ticks)
    scale = 10 ** int(factor.removeprefix("×10").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    assert len(set(labels)) == len(labels)
    for label, tick in zip(labels, ticks, strict=True):
        assert float(label.replace(numbers.MINUS, "-")) * scale == pytest.approx(tick, rel=1e-6, abs=1e-6 * (ticks[1] - ticks[0]))


@pytest.mark.parametrize(
    "value, shown",
    [(None, "–"), (0, "0"), (0.0, "0"), (0.5123, "0.512"), (-6.5868, "−6.59"), (1234.4, "1,234"), (0.000013, "1.30×10⁻⁵"), (2.5e7, "2.50×10⁷")],
)  # fmt: skip
def test_numbers_are_shown_with_three_digits(value, shown):
    assert numbers.short(value) == shown


@pytest.mark.parametrize("value, shown", [(1.2, "+1.20"), (-0.314, "−0.31"), (-0.001, "0.00"), (0.0, "0.00"), (None, "–")])
def test_changes_carry_their_sign_and_nothing_is_nothing(value, shown):
    assert numbers.signed(value) == shown


# --- drawing ----------------------------------------------------------------------------------------------------------------
def drawn(**chart):
    defaults = {"title": "t", "x": range(6), "series": [Series("a", [1, 2, 3, 4, 5, 6])]}
    return Document(line_chart(Chart(**defaults | chart)))


def paths(document, kind="line"):
    return [one["d"] for one in document.find("path", kind)]


@pytest.mark.slow
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_a_span_holds_all_values_and_is_never_empty(values, zero):
    low, high = svg.span(values, zero)
    assert low < high and low <= min(values) and high >= max(values)
    assert not zero or low <= 0 <= high and (min(values) < 0 or low == 0)


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), float("-inf")])
def test_a_missing_value_is_a_gap_not_a_bridge(missing):
    (path,) = paths(drawn(series=[Series("a", [1, 2, missing, 4, 5, 6])]))
    whole, broken = path.split("M")[1:]
    assert whole.count("L") == 1 and broken.count("L") == 2


def test_a_lone_value_between_gaps_is_a_dot_with_its_interval():
    values = [1, 2, None, 4, None, 6]
    document = drawn(series=[Series("a", values, values, [5] * 6)])
    dots, whiskers = document.find("circle", "dot"), document.find("line", "whisker")
    assert [dot["cx"] for dot in dots] == [whisker["x1"] for whisker in whiskers] == [whisker["x2"] for whisker in whiskers]
    assert len(dots) == 2 and all(dot["cy"] == whisker["y1"] != whisker["y2"] for dot, whisker in zip(dots, whiskers, strict=True))


def test_values_at_a_single_epoch_stand_side_by_side_around_it():
    document = drawn(x=[0], series=[Series("a", [3.0]), Series("b", [3.1])])
    left, right = (float(dot["cx"]) for dot in document.find("circle", "dot"))
    area = document.find("svg")[-1]
    assert left < (left + right) / 2 == pytest.approx((float(area["data-left"]) + float(area["data-right"])) / 2)


def test_a_band_stops_where_its_line_does():
    values = [1, 2, None, 4, 5, 6]
    wide = [None if value is None else value + 1 for value in values]
    (band,) = paths(drawn(series=[Series("a", values, values, wide)]), "band")
    assert band.count("M") == band.count("Z") == 2


def test_values_that_are_all_zero_are_said_not_drawn():
    document = drawn(series=[Series("a", [0.0] * 6)])
    assert document.find("svg") == [] and document.text("p", "flat") == ["0 at every epoch."]


def test_a_chart_without_values_is_no_chart():
    assert line_chart(Chart("t", range(2), [Series("a", [None, None])])) == ""


def test_the_trained_reward_is_drawn_on_top():
    text = line_chart(Chart("t", range(2), [Series("a", [1, 2], look="trained"), Series("b", [1, 2], look="gold")]))
    drawing = text[text.index('viewBox="0 0 400') :]
    assert drawing.index('class="gold"') < drawing.index('class="trained"')


def test_a_legend_reads_the_last_value_and_knows_all_others():
    document = drawn(series=[Series("a", [1, 2, 3, 4, 5, 6]), Series("b", [1, 1, 1, 1, 1, None])])
    assert [entry.split() for entry in document.text("li")] == [["a", "6.00"], ["b", "–"]]
    (readings,) = document.data("readings")
    assert readings["x"] == list(range(6)) and readings["values"][0] == ["1.00", "2.00", "3.00", "4.00", "5.00", "6.00"]


def test_markers_a_limit_and_the_shade_stand_in_the_drawing_and_in_the_legend():
    document = drawn(markers=[1, 4], marker_name="reset", limit=(3.0, "clipped to 3"), since=(2, "stalled since epoch 2"))
    in_drawing = 1  # each kind once more in the legend's swatch
    assert len(document.find("line", "marker")) == 2 + in_drawing
    assert len(document.find("line", "limit")) == 1 + in_drawing
    assert len(document.find("rect", "since")) == 1 + in_drawing
    assert document.text("li")[1:] == ["reset", "clipped to 3", "stalled since epoch 2"]


@pytest.mark.slow
@given(st.lists(st.floats(0, 300), max_size=12).map(sorted))
def test_names_at_the_ends_of_lines_keep_their_distance(heights):
    moved = svg.apart(heights, 15, 0, 300)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(moved))
    assert all(0 <= height <= 300 for height in moved)


# --- text stays text ----------------------------------------------------------------------------------------------------------
def test_hostile_words_are_only_words():
    chart = Chart(HOSTILE, range(2), [Series(HOSTILE, [1, 2], note=HOSTILE)], HOSTILE, x_label=HOSTILE, limit=(1, HOSTILE), since=(0, HOSTILE))
    table = html.part("table", [HOSTILE], [[HOSTILE, (HOSTILE, HOSTILE)]], HOSTILE)
    document = Document(line_chart(chart, wide=True) + html.part("facts", [(HOSTILE, HOSTILE)]) + table)
    for tag in ("h3", "dt", "dd", "caption"):
        assert document.text(tag) == [HOSTILE], tag
    assert document.text("th") == [HOSTILE] * 2 and document.text("td") == [f"{HOSTILE} {HOSTILE}"]
    assert document.find("img") == [] and [one["class"] for one in document.find("script")] == ["readings"]


@pytest.mark.slow
@settings(max_examples=30)
@given(st.recursive(st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_data_comes_back_as_it_was(value):
    (back,) = Document(html.data(value, "readings")).data("readings")
    assert back == value


# --- written whole or not at all ------------------------------------------------------------------------------------------------
def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    html.save("old odd \udcff name", file)  # not UTF-8, as a file's name may be

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html.disk.os, "fsync", full)
    with pytest.raises(WorkError, match="No space left on device. What was saved before is intact"):
        html.save("new", file)
    with pytest.raises(RequestError, match="is a folder; expected the name of a file"):
        html.save("x", tmp_path)
    assert file.read_text() == "old odd ? name" and [one.name for one in tmp_path.iterdir()] == ["report.html"]


# --- pictures ---------------------------------------------------------------------------------------------------------------
def made(folder, count, content=None):
    files = [folder / f"{i:04d}.png" for i in range(count)]
    for file in files:
        file.write_bytes(content or png((8, 6)))
    return files


def test_pictures_that_fit_are_embedded_as_they_are(tmp_path):
    files = made(tmp_path, 5)
    frames = pictures.fit(files)
    assert list(frames.places) == [0, 1, 2, 3, 4] and frames.left_out == ""
    assert [picture.content for picture in frames.pictures] == [file.read_bytes() for file in files]
    assert (frames.pictures[0].width, frames.pictures[0].height, frames.pictures[0].kind) == (8, 6, "image/png")
    assert base64.b64decode(frames.pictures[0].uri.removeprefix("data:image/png;base64,")) == files[0].read_bytes()


def test_large_pictures_are_made_smaller_before_they_are_left_out(tmp_path):
    content = png((300, 100), noise=random.Random(0))
    frames = pictures.fit(made(tmp_path, 10, content), budget=3 * len(content), widest=150)
    assert {(picture.kind, picture.width, picture.height) for picture in frames.pictures} == {("image/jpeg", 150, 50)}
    assert sum(len(picture.content) for picture in frames.pictures) <= 3 * len(content)
    assert len(frames.pictures) > 3 and "JPEG of at most 150 px" in frames.left_out


def test_a_torn_picture_is_left_out_and_it_is_said(tmp_path):
    files = made(tmp_path, 3)
    files[1].write_bytes(files[1].read_bytes()[:-6])
    frames = pictures.fit(files)
    assert list(frames.places) == [0, 2] and frames.left_out == "1 could not be read."


# --- a run's report -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 epochs and its page."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run", update__learning_rate=7e-4, model__resolution=[64, 96])
    return folder, report(folder)[1]


def test_a_report_shows_what_was_recorded(whole):
    _, document = whole
    assert document.text("h1") == ["run"]
    assert document.text("h2") == [
        "Rewards", "Pictures", "Each reward on its own scale", "Policy", "Critic", "Time and memory", "Settings", "Environment",
    ]  # fmt: skip
    assert document.text("h3") == [
        "All rewards on a common scale", "aesthetic", "gold", "pickscore", "hpsv2", "Agreement of the rewards", "approx_kl", "mean_kl",
        "Clip fractions", "Gradient norm of the policy", "Gradient norm of the critic", "ratio_drift", "Explained variance", "Dormant neurons",
        "Critic loss", "Seconds per epoch", "Images per second", "Peak memory, GB",
    ]  # fmt: skip
    facts = dict(zip(document.text("dt"), document.text("dd"), strict=True))
    assert (facts["algorithm"], facts["epochs"], facts["reward queries"]) == ("TDPO-R", "24 of 24", "1,152")
    assert "at 9, 19." in " ".join(document.text("p", "lead"))
    marked = [one["text"] for one in document.find("figure", "chart") if "neurons reset" in one["text"]]
    assert [text.strip()[:9] for text in marked] == ["Explained", "Dormant n", "Critic lo"]


def test_the_verdict_stands_on_top_and_shades_the_curves(whole):
    _, document = whole
    judged = verdict.read(verdict_rows(24), make_preset(reward__train="aesthetic", reward__watch=["gold", "pickscore", "hpsv2"]))
    assert judged.since is not None  # of these curves
    assert document.text("p", "verdict") == [judged.sentence]
    assert f"{judged.kind} since epoch {judged.since}" in document.text("li", "since")
    assert "true reward, never read by the verdict" in document.find("li", "gold")[0]["text"]
    assert re.search(r"\.gold \.line \{[^}]*stroke-dasharray", document.find("style")[0]["text"])


def test_settings_that_differ_are_listed_and_no_others(whole):
    folder, document = whole
    defaults = make_preset().as_dict()
    recorded = json.loads((folder / "preset.json").read_text())
    changed = {f"{section}.{key}" for section, keys in recorded.items() for key, value in keys.items() if value != defaults[section][key]}
    assert changed >= {"update.learning_rate", "model.resolution"}
    rows = [text for text in document.text("th") if "." in text.split(" ")[0]]
    assert len(rows) == len(changed) and all(any(text.startswith(key) for text in rows) for key in changed)
    assert {"0.0007", "64, 96"} <= set(document.text("td"))


def verdict_rows(epochs):
    return [metrics(epoch, ("aesthetic", "gold", "pickscore", "hpsv2")) for epoch in range(epochs)]


def test_the_common_scale_is_the_rise_in_units_of_epoch_0s_std(whole):
    _, document = whole
    rows = verdict_rows(24)
    for name, shown in zip(("aesthetic", "gold", "pickscore", "hpsv2"), document.data("readings")[0]["values"], strict=True):
        mean, std = f"rewards/{name}/mean", f"rewards/{name}/std"
        assert shown == [f"{numbers.signed((row[mean] - rows[0][mean]) / rows[0][std])} sd" for row in rows]


def test_bands_are_one_standard_error_wide(tmp_path):
    text, _ = report(make_run(tmp_path / "run", epochs=2))
    drawing = text[text.index('<svg class="narrow"') :].partition("</svg>")[0]
    ticks = re.findall(r'<line class="(?:grid|base)" x1="\S+" y1="(\S+)" x2="\S+" y2="\1"/><text[^>]*>([^<]+)</text>', drawing)
    (y_low, low), (y_high, high) = ((float(y), float(label.replace(numbers.MINUS, "-"))) for y, label in (ticks[0], ticks[-1]))
    unit = (y_low - y_high) / (high - low)
    bands = [[float(point.split(",")[1]) for point in band.split("L")] for band in re.findall(r'class="band" d="M([^"]*)Z"', drawing)]
    # over and under at epoch 0, where every reward is 0 and its standard deviation 1
    assert [round((band[-1] - band[0]) / unit, 2) for band in bands] == [round(2 / math.sqrt(48), 2)] * 4


def test_the_strip_starts_before_training_and_ends_with_the_last_epoch(tmp_path):
    folder = make_run(tmp_path / "run", epochs=12, algorithm__name="ddpo")
    (folder / "images" / "epoch_10000.png").write_bytes(png())
    (folder / "images" / "epoch_9999.png").write_bytes(png())
    _, document = report(folder)
    assert "DDPO has no critic." in document.text("p") and "Critic loss" not in document.text("h3")
    (frames,) = document.data("frames")
    assert [label for label, _ in frames] == ["before training", *(f"epoch {epoch}" for epoch in (*range(12), 9999, 10000))]
    shown = [image["src"] for image in document.find("img") if "src" in image]
    files = [folder / "images" / name for name in ("before.png", "epoch_10000.png")]
    assert [base64.b64decode(uri.partition(",")[2]) for uri in shown] == [file.read_bytes() for file in files]
    assert base64.b64decode(frames[5][1].partition(",")[2]) == (folder / "images" / "epoch_0004.png").read_bytes()
    assert frames[0][1] is frames[-1][1] is None  # embedded once


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, epochs):
    folder = make_run(tmp_path / "run", epochs=epochs)
    if epochs == 0:  # killed before its first word
        for file in [*(folder / "images").iterdir(), folder / "env.json"]:
            file.unlink()
    _, document = report(folder)
    facts = dict(zip(document.text("dt"), document.text("dd"), strict=True))
    assert facts["epochs"] == f"{epochs} of 24 so far"
    assert ("There will be curves once an epoch is finished." in document.text("p")) is (epochs == 0)
    assert ("All rewards on a common scale" in document.text("h3")) is (epochs > 0)
    assert ({"No pictures: no preview image is written yet.", "env.json is not there."} <= set(document.text("p"))) is (epochs == 0)


def test_a_torn_line_and_half_written_files_change_nothing(tmp_path):
    folder = make_run(tmp_path / "run", epochs=5)
    before, _ = report(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "reward_que')
    (folder / "images" / ".epoch_0005.png.tmp").write_bytes(png()[:100])
    (folder / "cross_eval.json").write_text("{}")
    assert report(folder)[0] == before


def test_missing_values_are_gaps_in_every_chart(tmp_path):
    keys = [key for key in metrics(0, ("aesthetic", "gold", "pickscore", "hpsv2")) if key not in ("epoch", "reward_queries")]
    nothing = dict.fromkeys(keys)
    _, document = report(make_run(tmp_path / "run", epochs=9, changed={4: nothing, 8: nothing}))
    lines = paths(document)
    assert lines and all(line.count("M") in (1, 2) for line in lines)
    assert sum(line.count("M") == 2 for line in lines) > 0.8 * len(lines)
    assert all(row["values"][0][-1] == "–" for row in document.data("readings"))


def test_a_line_with_nan_is_read_as_missing(tmp_path):
    folder = make_run(tmp_path / "run", epochs=9)
    file = folder / "metrics.jsonl"
    file.write_text(re.sub(r'"approx_kl": [^,]+', '"approx_kl": NaN', file.read_text()))
    text, document = report(folder)
    assert "approx_kl" not in document.text("h3") and "NaN" not in text.partition("<script>")[0]


def test_without_a_spread_at_epoch_0_a_reward_is_named_instead_of_drawn(tmp_path):
    _, document = report(make_run(tmp_path / "run", epochs=3, changed={0: {"rewards/gold/std": None}}))
    assert "Not drawn, because epoch 0 has no mean or no spread: gold." in document.text("p", "note")
    assert len(document.data("readings")[0]["values"]) == 3


def test_skipped_steps_are_said(tmp_path):
    _, document = report(make_run(tmp_path / "run", epochs=6, changed={2: {"skipped_steps": 3}, 4: {"skipped_steps": 1}}))
    assert document.text("p", "caution") == ["Optimizer steps skipped for a non-finite loss or gradient: 4, in epoch 2, 4."]


def test_hostile_settings_and_names_stay_text(tmp_path):
    name = "run <script>alert(1)<"
    folder = make_run(tmp_path / name, epochs=1, rollout__negative_prompt=HOSTILE, reward__train="mine.py:<img src=x onerror=alert(1)>")
    _, document = report(folder)
    assert document.text("h1") == [name]
    assert HOSTILE in document.text("td")
    assert [image for image in document.find("img") if image.get("src", "data:")[:5] != "data:"] == []


@pytest.mark.slow
def test_a_report_of_hundreds_of_epochs_stays_below_ten_megabytes(tmp_path):
    folder = make_run(tmp_path / "run", epochs=0, run__epochs=700)
    rows = [json.dumps(row) for row in verdict_rows(700)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    content = png((140, 100), noise=random.Random(1))
    for epoch in range(700):
        (folder / "images" / f"epoch_{epoch:04d}.png").write_bytes(content)
    assert 700 * len(content) > 20e6
    text, document = report(folder)
    (frames,) = document.data("frames")
    assert 1e6 < len(text.encode()) < 10e6
    assert f"{len(frames)} of 701 images, evenly spaced, as JPEG" in " ".join(document.text("p", "note"))
    assert frames[0][0] == "before training" and frames[-1][0] == "epoch 699"


@pytest.mark.slow
def test_thousands_of_epochs_are_drawn_thinned_out_and_it_is_said(tmp_path):
    folder = make_run(tmp_path / "run", epochs=0, run__epochs=5000)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdict_rows(2501)))
    text, document = report(folder)
    x = document.data("readings")[0]["x"]
    assert len(x) <= 1001 and (x[0], x[-1]) == (0, 2500)
    assert "of 2,501 epochs, evenly spaced" in " ".join(document.text("p", "lead"))
    assert len(text.encode()) < 3e6


def test_a_page_that_cannot_be_made_or_written_warns_and_fails_nothing(tmp_path, monkeypatch):
    folder, said = make_run(tmp_path / "run", epochs=1), []
    reporting.write_or_warn(folder, said.append)
    assert said == [] and (folder / "report.html").is_file()
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    reporting.write_or_warn(folder, said.append)
    (warning,) = said
    assert warning.startswith("no report.html: ") and f"`tdpo report {folder}`" in warning
    monkeypatch.setattr(reporting.page, "render", lambda *_: {}["nothing"])
    reporting.write_or_warn(folder, said.append)
    assert said[1].startswith("no report.html: ")


# --- the command ----------------------------------------------------------------------------------------------------------------
def test_the_command_writes_into_the_run_folder_unless_told_otherwise(tmp_path):
    folder = make_run(tmp_path / "run", epochs=3)
    outcome = tdpo("report", folder)
    assert (outcome.status, outcome.out) == (0, "") and str(folder / "report.html") in outcome.err
    elsewhere = tmp_path / "new" / "page.html"
    assert tdpo("report", folder, "--out", elsewhere, "--quiet").err == ""
    assert elsewhere.read_text() == (folder / "report.html").read_text()
    answer = json.loads(tdpo("report", folder, "--json").out)
    assert (answer["report"], answer["epochs"], answer["epochs_planned"]) == (str(folder / "report.html"), 3, 24)
    assert answer["bytes"] == (folder / "report.html").stat().st_size and answer["verdict"]["sentence"] in elsewhere.read_text()
    nowhere = tdpo("report", tmp_path / "nowhere")
    assert (nowhere.status, nowhere.err.strip()) == (2, f"tdpo: {tmp_path / 'nowhere'}: no run there (preset.json is missing).")


def test_a_damaged_line_is_named_and_no_page_is_written(tmp_path):
    folder = make_run(tmp_path / "run", epochs=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + "{broken\n" + lines[2])
    outcome = tdpo("report", folder)
    assert outcome.status == 2 and "metrics.jsonl: line 2 is damaged" in outcome.err
    assert not (folder / "report.html").exists()


# --- a cross-evaluation -----------------------------------------------------------------------------------------------------------
def evaluated(folder, **shape):
    result = make_cross_eval(folder, **shape)
    text = cross_eval_page.render(result, folder)
    return result, text, assert_asks_for_nothing(text)


def test_a_cross_evaluation_shows_every_run(tmp_path):
    result, _, document = evaluated(tmp_path / "eval")
    assert document.text("p", "verdict") == [run["verdict"]["sentence"] for run in result["runs"]]
    assert [title for title in document.text("h2") if title.startswith("run-")] == ["run-0", "run-1"]
    assert document.text("h3").count("Win rates") == document.text("h3").count("Diversity") == 2
    shown = document.data("readings")[0]
    assert shown["x"] == [4, 9, 14, 19] and shown["label"] == "epoch"
    assert shown["values"][0] == ["+0.50 sd", "+1.00 sd", "+1.50 sd", "+2.00 sd"]


def test_the_matrix_has_a_cell_for_every_run_and_reward_and_outlines_the_trained(tmp_path):
    result, _, document = evaluated(tmp_path / "eval")
    cells = document.find("span", "heat")
    expected = [numbers.signed(cell["mean"]) for row in result["matrix"]["standardised"] for cell in row]
    assert [cell["text"][: len(value)] for cell, value in zip(cells, expected, strict=True)] == expected
    assert [i % 4 for i, cell in enumerate(cells) if "own" in cell["class"].split()] == [0, 0]
    rising = ["up" in cell["class"].split() for cell in cells]
    assert rising == [cell["mean"] >= 0 for row in result["matrix"]["standardised"] for cell in row]


def test_one_checkpoint_of_one_run_is_shown_as_intervals_without_a_matrix(tmp_path):
    result, _, document = evaluated(tmp_path / "eval", runs=1, checkpoints=1)
    assert len(document.find("line", "whisker")) == 3 * len(result["rewards"]) + 2  # change, narrow and wide, win rate; agreement, diversity
    assert document.find("span", "heat") == [] and "Runs compared" not in document.text("h2")


def test_base_models_alone_have_a_page(tmp_path):
    _, _, document = evaluated(tmp_path / "eval", runs=0)
    assert document.text("h2") == ["The base model, raw"]


def test_a_checkpoint_of_no_run_has_a_page(tmp_path):
    result = make_cross_eval(tmp_path, runs=1, checkpoints=1)
    result["models"][1] |= {"run": None, "epoch": None, "trained_reward": None, "algorithm": None, "reward_queries": None, "updates": None}
    result["models"][1] |= {"prompts_trained_rises_others_fall": None, "diversity": None, "diversity_difference": None}
    result["runs"][0] |= {
        "run": "weights.safetensors",
        "algorithm": None,
        "trained_reward": None,
        "verdict": {"kind": "no verdict", "sentence": "what it was trained on is not known: no verdict", "since": None},
    }
    result["matrix"]["trained"] = ["weights.safetensors"]
    document = assert_asks_for_nothing(cross_eval_page.render(result, tmp_path))
    assert "weights.safetensors" in document.text("h2") and "None" not in "".join(document.text("main"))


def test_estimates_without_interval_or_mean_are_drawn_as_far_as_they_go(tmp_path):
    result = make_cross_eval(tmp_path, runs=1)
    for place, model in enumerate(result["models"][1:]):
        for cells in model["rewards"].values():
            for what in ("difference", "standardised", "win_rate"):
                cells[what] |= {"low": None, "high": None} | ({"mean": None} if place == 1 else {})
        model["scores"]["gold"][0] = [None] * 4
    result["matrix"]["standardised"] = [[{"mean": None, "low": None, "high": None}] * 4]
    document = assert_asks_for_nothing(cross_eval_page.render(result, tmp_path))
    assert document.data("readings")[0]["values"][0] == ["+0.50 sd", "–", "+1.50 sd", "+2.00 sd"]
    assert "nan" not in "".join(document.text("td")).lower()


def test_every_pair_can_be_chosen_and_is_the_same_prompt_and_noise(tmp_path):
    result, _, document = evaluated(tmp_path / "eval", checkpoints=2, prompts=3)
    (content,) = document.data("images")
    assert content["models"] == [model["name"] for model in result["models"]] and content["prompts"] == result["prompts"]
    assert content["bases"] == [0] * 5
    for model, by_prompt in zip(result["models"], content["images"], strict=True):
        for p, uris in enumerate(by_prompt):
            for i, uri in enumerate(uris):
                file = tmp_path / "eval" / model["images"] / f"{p:04d}-{i:02d}.png"
                assert base64.b64decode(uri.partition(",")[2]) == file.read_bytes()
    assert document.text("option")[:3] == result["prompts"]  # the first of them is hostile


def test_a_missing_image_is_a_gap_and_no_images_is_no_gallery(tmp_path):
    result = make_cross_eval(tmp_path, runs=1, checkpoints=1, prompts=2)
    (tmp_path / "images" / "base" / "0001-02.png").unlink()
    (content,) = assert_asks_for_nothing(cross_eval_page.render(result, tmp_path)).data("images")
    assert content["images"][0][1][2] == "" and content["images"][0][1][1] != ""
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert "Pictures" not in assert_asks_for_nothing(cross_eval_page.render(result, tmp_path)).text("h2")


@pytest.mark.slow
def test_large_cross_evaluations_are_cut_down_and_it_is_said(tmp_path):
    image = png((300, 300), noise=random.Random(0))
    result = make_cross_eval(tmp_path, runs=2, checkpoints=6, prompts=10, per_prompt=3, image=image)
    shown = gallery.gallery(result, tmp_path, budget=10 * len(image))
    content = shown["content"]
    assert len(json.dumps(content)) < 4 / 3 * 10 * len(image) + 1e5
    assert content["models"] == [model["name"] for model in result["models"]]
    assert f"{len(content['prompts'])} of 10 prompts" in shown["left_out"] and "JPEG of at most 256 px" in shown["left_out"]
