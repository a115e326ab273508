"""Facts about the server that `make parity` starts in the upstream packages' environment: a stand-in scorer gets every pixel and every letter."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import compare
from compare import HERE, PROMPTS, SIZES

from tdpo_cli.errors import RewardError, WorkError

STAND_IN = f"""
import hashlib, sys
sys.path.insert(0, {str(HERE)!r})
from server import server

def score(pixels, width, height, prompt):
    if prompt == "fail":
        raise KeyError("colour")
    said = f"{{width}} {{height}} {{prompt}}".encode()
    return int.from_bytes(hashlib.sha256(pixels + said).digest()[:3], "big")  # a float32 holds 24 bits

assert not set(sys.modules) & {{"torch", "numpy", "PIL", "tdpo_cli"}}
answers = server(score, "/" + sys.argv[1], "stand-in 1.0")
print("loading")
print(f"http://127.0.0.1:{{answers.server_port}}/{{sys.argv[1]}}", flush=True)
answers.serve_forever()
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    return file


@pytest.mark.slow
def test_pixels_and_prompts_arrive_as_they_are(program, tmp_path):
    pairs = [(f"{width}x{height}.png", prompt) for width, height in SIZES for prompt in PROMPTS]
    for width, height in SIZES:
        compare._image(width, height).save(tmp_path / f"{width}x{height}.png")
    expected = [
        int.from_bytes(hashlib.sha256(image.tobytes() + f"{image.width} {image.height} {prompt}".encode()).digest()[:3], "big")
        for image in (compare._image(*size) for size in SIZES) for prompt in PROMPTS
    ]  # fmt: skip
    with compare.served(sys.executable, "hpsv2", tmp_path, program) as reward:
        assert reward.describe()["version"] == "stand-in 1.0" and reward.needs_prompt
        assert compare._scores(reward, tmp_path, pairs) == expected
        images = torch.rand(3, 3, 5, 7)  # of one size: in one question
        assert reward.score(images, ["a", "b", "c"]).tolist() == [reward.score(images[i : i + 1], ["abc"[i]]).item() for i in range(3)]


def test_a_scorer_that_fails_or_does_not_start_is_named(program, tmp_path, monkeypatch):
    monkeypatch.setenv("TDPO_REWARD_PATIENCE", "0.1")
    with compare.served(sys.executable, "hpsv2", tmp_path, program) as reward:
        with pytest.raises(WorkError, match="KeyError: 'colour'"):
            reward.score(torch.zeros(1, 3, 2, 2), ["fail"])
        status, _, answer = reward._exchange("POST", b'{"protocol": "tdpo-reward/1"}')
        assert status == 400 and b"not a question: KeyError" in answer
        reward.address = reward.address.__class__(**{**vars(reward.address), "path": "/other"})
        with pytest.raises(RewardError, match="no reward here, but at /hpsv2"):
            reward.score(torch.zeros(1, 3, 2, 2), ["a"])
    program.write_text("import sys; sys.exit('no such package')")
    failed = "the upstream code failed on hpsv2:\nno such package"
    with pytest.raises(SystemExit, match=failed), compare.served(sys.executable, "hpsv2", tmp_path, program):
        pass
