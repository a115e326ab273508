"""Many runs at once: the list of them, and the page that compares them."""

import json
import os
import re

import pytest
from helpers import tdpo
from page_examples import HOSTILE, make_run

from tdpo_cli.console import Console
from tdpo_cli.errors import RequestError
from tdpo_cli.report import report as reporting
from tdpo_cli.report import runs


def test_runs_are_found_below_a_folder_and_told_apart(tmp_path):
    make_run(tmp_path / "a", epochs=24)
    make_run(tmp_path / "deeper" / "b", epochs=3, algorithm__name="ddpo")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "preset.json").write_text("{")
    os.symlink(tmp_path / "a", tmp_path / "linked")
    (tmp_path / "notes.txt").write_text("no run")
    rows = {os.path.relpath(row["run"], tmp_path): row for row in runs.find(tmp_path)}
    assert set(rows) == {"a", "damaged", "deeper/b"}
    assert (rows["a"]["epochs"], rows["a"]["epochs_planned"], rows["a"]["algorithm"], rows["a"]["reward"]) == (24, 24, "tdpo-r", "aesthetic")
    assert rows["a"]["rise"] > 0 and rows["a"]["verdict"]["kind"] not in ("too early", "unwatched") and rows["a"]["bytes"] > 1000
    assert rows["deeper/b"]["verdict"]["kind"] == "too early" and rows["deeper/b"]["algorithm"] == "ddpo"
    assert "preset.json" in rows["damaged"]["error"]


def test_runs_command_prints_a_list_and_fits_80_columns(tmp_path):
    make_run(tmp_path / "quickstart-0001")
    listed = json.loads(tdpo("runs", tmp_path, "--json").out)
    assert [row["run"] for row in listed] == [str(tmp_path / "quickstart-0001")]
    shown = tdpo("runs", tmp_path)
    assert "quickstart-0001" in shown.out and max(map(len, shown.out.splitlines())) <= 80
    assert tdpo("runs", tmp_path / "missing").status == 2


def test_several_runs_are_compared_on_one_page(tmp_path):
    folders = [make_run(tmp_path / "first", epochs=24), make_run(tmp_path / "second", epochs=12, algorithm__name="ddpo", update__clip_range=0.5)]
    summary = reporting.compare(folders, tmp_path / "page.html", Console(quiet=True))
    text = (tmp_path / "page.html").read_text()
    assert [run["epochs"] for run in summary["runs"]] == [24, 12]
    for name in ("first", "second", "aesthetic", "gold", "pickscore", "hpsv2", "algorithm.name", "update.clip_range"):
        assert name in text
    assert "update.learning_rate" not in text  # equal in both
    readings = [json.loads(found) for found in re.findall(r'class="readings">(.*?)</script>', text)]
    assert readings[0]["x"] == list(range(24)) and readings[0]["values"][1][11:13] != ["–", "–"] and readings[0]["values"][1][12] == "–"


def test_comparison_keeps_hostile_names_as_text_and_has_a_limit(tmp_path):
    name = HOSTILE.replace("/", "")
    folders = [make_run(tmp_path / name, epochs=2), make_run(tmp_path / "b", epochs=2)]
    reporting.compare(folders, tmp_path / "page.html", Console(quiet=True))
    assert "<img src=x" not in (tmp_path / "page.html").read_text()
    with pytest.raises(RequestError, match="at most"):
        reporting.compare(folders * 5, tmp_path / "page.html", Console(quiet=True))
