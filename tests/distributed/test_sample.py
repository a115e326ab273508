"""Samples do not depend on how many processes made them."""

import pytest
from helpers import tdpo

PROMPTS = ("a red circle on a blue background", "a cyan ring on a black background")


@pytest.mark.slow
def test_two_processes_write_the_samples_of_one(nursery, tmp_path):
    settings = ("--steps", "3", "--per-prompt", "3", "--seed", "5")
    alone = tdpo("sample", "base", *PROMPTS, *settings, "--out", str(tmp_path / "one"))
    assert alone.status == 0
    together = nursery.tdpo("sample", "base", *PROMPTS, *settings, "--out", tmp_path / "two", "--processes", "2", worker="worker.py")
    assert together.returncode == 0, together.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(files) == 9  # six images, their list, the grid, the lock
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_standard_input_is_refused_with_several_processes():
    refused = tdpo("sample", "base", "-", "--processes", "2")
    assert refused.status == 2
    assert "standard input" in refused.err
