"""Facts about the folder of samples: it belongs to one process, and metadata.jsonl comes last."""

import pytest
from helpers import tdpo
from PIL import Image

from tdpo_cli.storage import disk

ARGUMENTS = ("sample", "base", "a red circle on a blue background", "--steps", "1")


def test_a_second_process_in_one_folder_is_refused(tmp_path):
    held = disk.lock(tmp_path / "out", "sampling")
    done = tdpo(*ARGUMENTS, "--out", tmp_path / "out")
    assert done.status == 2 and "another tdpo process is sampling in this folder" in done.err
    assert not list((tmp_path / "out").glob("*.png"))
    held.close()


@pytest.mark.slow
def test_without_out_each_takes_a_folder_of_its_own_and_a_refusal_leaves_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tdpo(*ARGUMENTS, "--device", "quantum").status == 2
    assert not (tmp_path / "samples").exists()
    (tmp_path / "samples/base-0001").mkdir(parents=True)  # as another process has just made it
    assert tdpo(*ARGUMENTS).status == 0
    assert not list((tmp_path / "samples/base-0001").iterdir()) and (tmp_path / "samples/base-0002/metadata.jsonl").exists()


@pytest.mark.slow
def test_the_list_of_images_is_written_last(tmp_path, monkeypatch):
    real = Image.Image.save

    def full(self, file, *arguments, **more):
        if "grid" in str(file):
            raise OSError(28, "No space left on device")
        return real(self, file, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert tdpo(*ARGUMENTS, "--out", tmp_path).status == 1
    assert not (tmp_path / "metadata.jsonl").exists()
    assert tdpo(*ARGUMENTS, "--out", tmp_path).status == 0
    assert "already holds samples" in tdpo(*ARGUMENTS, "--out", tmp_path).err
