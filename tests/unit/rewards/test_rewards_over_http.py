"""Rewards behind HTTP: whole answers or one message. A real server on a free port, and one that misbehaves as it is told."""

import base64
import contextlib
import http.client
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import tdpo
from PIL import Image

from tdpo_cli import rewards
from tdpo_cli.errors import RequestError, RewardError, WorkError
from tdpo_cli.rewards import protocol, remote, serve
from tdpo_cli.rewards.backbones import Backbones
from tdpo_cli.rewards.custom import FunctionReward

IMAGES = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "c, d", "", "\u00e9 \u4e16"]


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def offering(*own, max_body=protocol.MAX_BODY):
    offered = [serve.Offer("/" + reward.name.rpartition(":")[2], reward) for reward in own] or serve.offers(
        ["jpeg-compressibility"], "cpu", {}, "tdpo"
    )
    return serve.Server(("127.0.0.1", 0), offered, max_body)


def function(name, score, needs_prompt=True):
    return FunctionReward(f"my.py:{name}", score, needs_prompt)


# --- the address --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["http://127.0.0.1:8765/aesthetic", "https://judge.example/v1/hpsv3", "http://[::1]:80/hpsv2.1", "HTTP://host:1/a"])
def test_address_is_the_name_of_a_reward(name):
    rewards.check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "http://", "http://host:8765", "http://host:8765/", "http://host:99999/a", "http://host:x/a", "http:///a", "http://host/a?b=c", "http://host/a#b",
        "http://user:secret@host/a", "http://host/a b", "http://host/a\r\nX: y", "http://ho st/a", "http://host/a,b", "https://[::1/a", "http://host/a/",
    ],
)  # fmt: skip
def test_address_that_is_none_is_refused_before_anything_is_sent(name):
    with pytest.raises(RewardError) as caught:
        rewards.check_name(name)
    assert "http://HOST:PORT/PATH" in str(caught.value) and "secret" not in str(caught.value)


def test_rewards_that_reach_outside_are_known_by_their_name():
    assert {name for name in rewards.names() if rewards.reaches_outside(name)} == set()
    assert rewards.reaches_outside("no_such_module:f") == rewards.reaches_outside("a/b.py:f") == "run code"
    assert rewards.reaches_outside("https://judge.example/hpsv3") == "send pictures to judge.example"


def test_server_that_only_a_run_names_gets_no_pictures():
    name = "http://judge.example/hpsv3"
    rewards.check_trusted([name, "gold"], [name], "preset.json")
    with pytest.raises(RequestError, match="would send pictures to judge.example.*--trust-rewards"):
        rewards.check_trusted([name, "gold"], ["gold"], "preset.json")


@pytest.mark.parametrize("name,short", [("aesthetic", "aesthetic"), ("a/b.py:f", "b.py:f"), ("http://h:1/v1/x", "x@h:1"), ("https://h/x", "x@h:443")])
def test_tables_show_a_short_name(name, short):
    assert rewards.short_name(name) == short


def test_checking_an_address_imports_no_torch():
    code = "import sys; from tdpo_cli import rewards; rewards.check_name('http://h:1/a'); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- client and server ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", protocol.ENCODINGS)
def test_scores_over_http_are_those_of_the_reward_itself(encoding):
    seen = []

    def score(images, prompts):
        seen.append((images.clone(), list(prompts)))
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    with running(offering(function("mean", score))) as place:
        reward = rewards.load(f"{place}/mean", Backbones())
        reward.description["encoding"] = encoding
        found = reward.score(IMAGES, PROMPTS)
    levels = (IMAGES * 255).round() / 255
    assert torch.equal(seen[0][0], levels) and seen[0][1] == PROMPTS
    assert torch.equal(found, score(levels, PROMPTS))
    assert found.dtype == torch.float32


def test_description_of_a_served_reward_names_address_version_and_scale():
    with running(offering()) as place:
        reward = rewards.load(f"{place}/jpeg-compressibility", Backbones())
    assert reward.needs_prompt is False
    said = reward.describe()
    assert (said["checkpoint"], said["scale"]) == (f"{place}/jpeg-compressibility", "kilobytes, negated")
    assert said["version"].startswith("tdpo ")


def test_images_of_one_question_are_limited_and_answers_keep_their_order(monkeypatch):
    monkeypatch.setattr(remote, "MAX_QUESTION", 2 * IMAGES[0].numel())  # two images, of uint8
    sizes = []
    score = lambda images, prompts: sizes.append(len(images)) or images.mean(dim=(1, 2, 3))
    with running(offering(function("mean", score))) as place:
        found = rewards.load(f"{place}/mean", Backbones()).score(IMAGES, PROMPTS)
    assert sizes == [2, 2, 1]
    assert found.tolist() == pytest.approx(((IMAGES * 255).round() / 255).mean(dim=(1, 2, 3)).tolist())


def test_number_that_is_not_finite_travels_as_null_and_arrives_as_nan():
    with running(offering(function("half", lambda images, prompts: [1.0, math.nan, math.inf, -math.inf, 0.5]))) as place:
        assert [math.isnan(score) for score in rewards.load(f"{place}/half", Backbones()).score(IMAGES, PROMPTS)] == [False, True, True, True, False]


def test_request_that_the_reward_refuses_comes_back_as_its_message_at_once():
    def refuse(images, prompts):
        raise RewardError("no text in quotes")

    with running(offering(function("refuse", refuse))) as place:
        reward = rewards.load(f"{place}/refuse", Backbones())
        with pytest.raises(RewardError, match=r"refused \(400\): no text in quotes"):
            reward.score(IMAGES, PROMPTS)


def test_reward_that_is_not_served_there_is_refused_with_those_that_are():
    with running(offering()) as place, pytest.raises(RewardError, match="404.*there are: /jpeg-compressibility"):
        rewards.load(f"{place}/aesthetic", Backbones())


def test_http_reward_takes_no_checkpoint():
    with pytest.raises(RewardError, match="takes no checkpoint"):
        rewards.load("http://127.0.0.1:1/a", Backbones(), checkpoint="x")


# --- a server that misbehaves -----------------------------------------------------------------------------------------------
class Misbehaving(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, self.server.description)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        act = self.server.script.pop(0) if self.server.script else None
        if act == "drop":
            self.close_connection = True
        elif act == "hang":
            self.server.over.wait(10)
            self.close_connection = True
        elif act == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
            self.close_connection = True
        elif isinstance(act, tuple):
            self.reply(*act)
        else:
            self.reply(200, protocol.answer([float(len(prompt)) for prompt in body["prompts"]], "v1"))

    def reply(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def misbehaving(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    monkeypatch.setenv("TDPO_REWARD_TIMEOUT", "0.3")
    monkeypatch.setenv("TDPO_REWARD_PATIENCE", "2")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.daemon_threads = True
    server.script, server.asked, server.over = [], 0, threading.Event()
    server.description = {"protocol": protocol.PROTOCOL, "version": "v1"}
    with running(server) as server.place:
        yield server
        server.over.set()


def answer(**changes):
    return {"protocol": protocol.PROTOCOL, "version": "v1", "scores": [1, 2, 3, 4, 5], **changes}


@pytest.mark.parametrize(
    "fault", ["drop", "hang", "half", (503, {"error": "starting"}), (429, {}), (500, {"error": "once"}), (200, b"{"), (200, b"")]
)
def test_question_is_asked_again_after_a_passing_fault(misbehaving, fault):
    misbehaving.script = [fault, fault]
    found = rewards.load(f"{misbehaving.place}/judge", Backbones()).score(IMAGES, PROMPTS)
    assert found.tolist() == [float(len(prompt)) for prompt in PROMPTS]
    assert misbehaving.asked == 3


@pytest.mark.parametrize(
    "wrong,message",
    [
        (answer(scores=[1, 2, 3, 4]), "4 scores for 5 images"),
        (answer(scores=[1, 2, 3, 4, 5, 6]), "6 scores for 5 images"),
        (answer(scores=[1, 2, 3, 4, "5"]), "neither null nor a number"),
        (answer(scores=[1, 2, 3, 4, True]), "neither null nor a number"),
        (answer(scores=[1, 2, 3, 4, 1e39]), "float32's range"),
        (b'{"protocol": "tdpo-reward/1", "version": "v1", "scores": [NaN, 2, 3, 4, 5]}', "neither null nor a number"),
        (answer(scores={"0": 1}), "no list called scores"),
        (answer(protocol="other/9"), "protocol is 'other/9', expected 'tdpo-reward/1'"),
        (answer(version=None), "version: expected a text"),
        ([1, 2, 3, 4, 5], "not a JSON object"),
        (b"<html>", "this is not JSON"),
    ],
)
def test_wrong_answer_gives_no_row_but_one_message_after_three_attempts(misbehaving, wrong, message):
    misbehaving.script = [(200, wrong)] * 10
    reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
    with pytest.raises(WorkError, match=message) as caught:
        reward.score(IMAGES, PROMPTS)
    assert str(caught.value).startswith(f"{misbehaving.place}/judge: ") and "\n" not in str(caught.value)
    assert misbehaving.asked == remote.BAD_ANSWERS


@pytest.mark.parametrize(
    "fault,message", [("drop", "no answer"), ("hang", "no answer within 0.3 s"), ((503, {"error": "busy"}), r"failed \(503\): busy")]
)
def test_server_that_stays_away_ends_the_work_when_patience_does(misbehaving, fault, message, monkeypatch):
    monkeypatch.setenv("TDPO_REWARD_PATIENCE", "0.5")
    misbehaving.script = [fault] * 1000
    reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
    started = time.monotonic()
    with pytest.raises(WorkError, match=message):
        reward.score(IMAGES, PROMPTS)
    assert misbehaving.asked > 1 and time.monotonic() - started < 5


def test_other_version_of_the_server_ends_the_work(misbehaving):
    reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
    misbehaving.script = [(200, answer(version="v2"))]
    with pytest.raises(WorkError, match="was 'v1' and is now 'v2'"):
        reward.score(IMAGES, PROMPTS)


def test_redirect_is_not_followed(misbehaving):
    elsewhere = offering()
    with running(elsewhere) as place:
        misbehaving.script = [(307, {})]
        misbehaving.RequestHandlerClass = type("Redirecting", (Misbehaving,), {
            "reply": lambda self, status, content: Misbehaving.reply(self, status, content, Location=f"{place}/jpeg-compressibility"),
        })  # fmt: skip
        reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
        with pytest.raises(RewardError, match="307.*not followed"):
            reward.score(IMAGES, PROMPTS)
    assert misbehaving.asked == 1


def test_answer_without_end_is_cut_off(misbehaving, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ANSWER", 1000)
    misbehaving.script = [(200, b" " * 100_000)] * 10
    reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
    with pytest.raises(WorkError, match="longer than 1,000 bytes"):
        reward.score(IMAGES, PROMPTS)


def test_control_characters_of_a_server_do_not_reach_the_message(misbehaving):
    misbehaving.script = [(400, {"error": "a\x1b[31mb\nc" + "d" * 5000})]
    reward = rewards.load(f"{misbehaving.place}/judge", Backbones())
    with pytest.raises(RewardError) as caught:
        reward.score(IMAGES, PROMPTS)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_server_that_is_not_there_is_said_at_once_and_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    monkeypatch.setenv("TDPO_REWARD_PATIENCE", "0.1")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = tdpo("score", tmp_path, "--rewards", "http://127.0.0.1:9/judge", "--prompt", "x", "--out", tmp_path / "s.jsonl")
    assert done.status == 2
    assert "http://127.0.0.1:9/judge: no answer" in done.err and "Start the server" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_patience_that_is_no_number_of_seconds_is_refused(value, monkeypatch):
    monkeypatch.setenv("TDPO_REWARD_PATIENCE", value)
    with pytest.raises(RewardError, match="TDPO_REWARD_PATIENCE=.*seconds"):
        rewards.load("http://127.0.0.1:9/judge", Backbones())


# --- what the server refuses ------------------------------------------------------------------------------------------------
def post(place, body, path="/jpeg-compressibility", **headers):
    connection = http.client.HTTPConnection(place.removeprefix("http://"), timeout=10)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    try:
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def question(images, prompts=("a",), **changes):
    return json.dumps({"protocol": protocol.PROTOCOL, "prompts": list(prompts), "images": images, **changes}).encode()


RAW = {"encoding": "raw", "shape": [1, 2, 2, 3], "data": base64.b64encode(bytes(12)).decode()}


@pytest.fixture(scope="module")
def place():
    with running(offering(max_body=3 * 100 * 100)) as place:
        yield place


@pytest.mark.parametrize(
    "body,seen",
    [
        (b"", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (question(RAW, protocol="other"), "protocol is 'other'"),
        (question(RAW, prompts=["a", "b"]), "1 images but 2 prompts"),
        (question(RAW, prompts=[3]), "prompts: expected"),
        (question({**RAW, "encoding": "jpeg"}), "expected an object with encoding raw or png"),
        (question({**RAW, "shape": [1, 2, 2, 4]}), "images.shape"),
        (question({**RAW, "shape": [1, -2, -2, 3]}), "images.shape"),
        (question({**RAW, "shape": [1, True, 2, 3]}), "images.shape"),
        (question({**RAW, "shape": [10**9, 10**9, 10**9, 3]}), "12 bytes, the shape needs"),
        (question({**RAW, "data": "!!!!"}), "expected base64"),
        (question({**RAW, "data": None}), "expected base64"),
        (question({"encoding": "png", "data": []}), "a list of PNG files"),
        (question({"encoding": "png", "data": [base64.b64encode(b"GIF89a").decode()]}), "not a readable PNG"),
        (question({"encoding": "png", "data": [png(8, 8)[:40]]}), "not a readable PNG|base64"),
        (question({"encoding": "png", "data": [png(101, 100)]}), "more than the 30,000 bytes allowed"),  # a bomb: small as a file
        (question({"encoding": "png", "data": [png(8, 8), png(8, 9)]}, prompts=["a", "b"]), "one size"),
    ],
)
def test_request_that_is_not_the_protocol_s_is_refused_with_what_is_wrong(place, body, seen):
    import re

    status, content = post(place, body)
    assert status == 400 and re.search(seen, content["error"]), content


def test_request_too_long_or_of_another_kind_is_refused_unread(place):
    assert post(place, b"x" * 200_000)[0] == 413
    assert post(place, question(RAW), **{"Content-Type": "text/plain"})[0] == 415
    assert post(place, question(RAW), **{"Content-Length": "-5"})[0] == 411
    assert post(place, question(RAW), path="/other")[0] == 404


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_png_of_any_mode_is_scored_as_rgb(place, mode):
    status, content = post(place, question({"encoding": "png", "data": [png(8, 8, mode)]}))
    assert status == 200 and len(content["scores"]) == 1


def test_server_answers_after_every_refusal(place):
    assert post(place, question(RAW))[0] == 200


def test_root_lists_rewards_protocol_and_version(place):
    connection = http.client.HTTPConnection(place.removeprefix("http://"), timeout=10)
    connection.request("GET", "/")
    content = json.loads(connection.getresponse().read())
    connection.close()
    assert content["protocol"] == protocol.PROTOCOL and content["version"].startswith("tdpo ")
    assert list(content["rewards"]) == ["/jpeg-compressibility"]


def test_reward_that_raises_is_a_500_and_the_next_request_is_answered():
    fails = iter([True, True, True, False])

    def shaky(images, prompts):
        if next(fails):
            raise ZeroDivisionError("of the reward")
        return [1.0] * len(images)

    with running(offering(function("shaky", shaky))) as place:
        reward = rewards.load(f"{place}/shaky", Backbones())
        with pytest.raises(WorkError, match=r"500\): ZeroDivisionError: of the reward"):
            reward.score(IMAGES[:1], ["a"])
        assert reward.score(IMAGES[:1], ["a"]).tolist() == [1.0]


def test_questions_share_one_connection():
    with running(offering()) as place:
        reward = rewards.load(f"{place}/jpeg-compressibility", Backbones())
        connection, ports = reward.connection, set()
        for _ in range(3):
            reward.score(IMAGES, PROMPTS)
            ports.add(reward.connection.sock.getsockname()[1])
        assert reward.connection is connection and len(ports) == 1


def test_images_are_scored_one_request_at_a_time():
    inside = []

    def careful(images, prompts):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.02)
        inside.pop()
        return [float(prompt) for prompt in prompts]

    with running(offering(function("careful", careful))) as place:
        found = {}

        def client(number):
            found[number] = rewards.load(f"{place}/careful", Backbones()).score(IMAGES[:2], [str(number), str(number + 0.5)]).tolist()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: [number, number + 0.5] for number in range(6)}


def test_server_in_the_documentation_serves(root):
    text = (root / "docs/rewards.md").read_text()
    example = text[text.index("This one is whole:") :].split("```python\n")[1].split("```")[0]
    names = {"__name__": "example"}
    exec(example, names)
    with running(names["HTTPServer"](("127.0.0.1", 0), names["Handler"])) as place:
        reward = rewards.load(f"{place}/brightness", Backbones())
        assert reward.needs_prompt is False
        assert reward.score(IMAGES, PROMPTS).tolist() == pytest.approx((IMAGES * 255).round().mean(dim=(1, 2, 3)).tolist(), rel=1e-5)


# --- the command ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments,seen",
    [
        (["asthetic"], "Did you mean aesthetic"),
        (["http://127.0.0.1:1/a"], "is served already"),
        (["gold", "--zoo", "other"], "--zoo other: expected sandbox"),
        (["gold", "--host", "203.0.113.1", "--port", "0"], "cannot listen on 203.0.113.1"),
        (["gold", "--checkpoint", "nonsense"], "expected REWARD=PATH"),
    ],
)
def test_serve_refuses_what_it_cannot_serve(arguments, seen):
    done = tdpo("serve", *arguments)
    assert (done.status, done.out) == (2, "") and seen in done.err


def test_two_rewards_of_one_path_are_refused():
    with pytest.raises(RequestError, match="two rewards would both be served at /f"):
        serve.offers(["a.py:f", "b.py:f"], "cpu", {}, "tdpo")


@pytest.mark.slow
def test_serve_and_score_by_the_command_line_agree_and_sigterm_lets_the_last_request_finish(tmp_path):
    (tmp_path / "my.py").write_text("import time\ndef slow(images, prompts):\n    time.sleep(1)\n    return images.mean(dim=(1, 2, 3))\n")
    (tmp_path / "p").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "p" / f"{i}.png")
    command = [sys.executable, "-m", "tdpo_cli", "serve", "aesthetic", f"{tmp_path}/my.py:slow", "--zoo", "sandbox", "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        urls = json.loads(server.stdout.readline())["urls"]
        common = ["score", tmp_path / "p", "--prompt", "x", "--batch-size", "6"]
        assert tdpo(*common, "--rewards", urls["aesthetic"], "--out", tmp_path / "there.jsonl").status == 0
        assert tdpo(*common, "--rewards", "aesthetic", "--zoo", "sandbox", "--out", tmp_path / "here.jsonl").status == 0
        rows = [[json.loads(line) for line in (tmp_path / name).open()] for name in ("there.jsonl", "here.jsonl")]
        assert [row[urls["aesthetic"]] for row in rows[0]] == pytest.approx([row["aesthetic"] for row in rows[1]], abs=1e-5)

        reward, found = rewards.load(urls[f"{tmp_path}/my.py:slow"], Backbones()), []
        asking = threading.Thread(target=lambda: found.append(reward.score(IMAGES, PROMPTS)))
        asking.start()
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        asking.join()
        assert len(found) == 1 and len(found[0]) == len(IMAGES)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.communicate()
