"""Facts about prompt sources."""

import io

import pytest

from tdpo_cli.config import prompts
from tdpo_cli.errors import RequestError


def test_simple_animals_are_the_45_of_ddpo():
    animals = prompts.load("simple-animals")
    assert len(animals) == len(set(animals)) == 45
    assert animals[:2] == ["cat", "dog"] and animals[-1] == "kangaroo"


def test_a_list_may_be_changed_by_its_reader():
    prompts.load("simple-animals").clear()
    assert prompts.load("simple-animals")


def test_sandbox_prompts_for_evaluation_are_held_out_from_training():
    training, held_out = set(prompts.load("sandbox:all")), set(prompts.load("sandbox:held-out"))
    assert training and held_out and not training & held_out
    assert set(prompts.load("sandbox")) <= training
    assert len(prompts.load("sandbox")) == 8


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a cat\n\n  a dog \n"),
        ("p.txt", "\ufeffa cat\r\na dog"),
        ("p.jsonl", '{"prompt": "a cat", "x": 1}\n\n{"prompt": " a dog"}\n'),
        ("p.csv", 'x,prompt\n1,a cat\n2,"a dog"\n'),
    ],
)
def test_a_file_gives_its_prompts_without_blank_ones(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert prompts.load(str(tmp_path / name)) == ["a cat", "a dog"]


def test_commas_and_quotes_survive_csv(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"a cat, a ""big"" one"\n')
    assert prompts.load(str(tmp_path / "p.csv")) == ['a cat, a "big" one']


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "none.txt: no such prompt file"),
        ("p.txt", b"\n \n", "p.txt: no prompts in it"),
        ("p.txt", b"\xff\xfe\xff", "p.txt: cannot be read as UTF-8 text"),
        ("p.jsonl", b'{"text": "a cat"}\n', "p.jsonl: every row needs a `prompt`"),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl: every row needs a `prompt`"),
        ("p.jsonl", b'["a cat"]\n', "p.jsonl: every row needs a `prompt`"),
        ("p.jsonl", b"a cat\n", "p.jsonl: not valid jsonl"),
        ("p.csv", b"text\na cat\n", "p.csv: every row needs a `prompt`"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        prompts.load(str(tmp_path / name))


@pytest.mark.parametrize(
    "source, message",
    [
        ("simple-animal", "unknown prompt source 'simple-animal'. Did you mean simple-animals"),
        ("sandbox:heldout", "unknown prompt source 'sandbox:heldout'. Did you mean sandbox:held-out"),
        ("hpsv2:photos", "unknown prompt source hpsv2:photos. Did you mean hpsv2:photo"),
    ],
)
def test_an_unknown_source_gets_a_suggestion(source, message):
    with pytest.raises(RequestError, match=message):
        prompts.load(source)


def test_a_list_that_cannot_be_fetched_says_how_to(monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(RequestError, match="hf download --repo-type dataset zhwang/HPDv2 benchmark/photo.json"):
        prompts.load("hpsv2:photo")


def test_blank_lines_of_hpsv2_are_no_prompts(monkeypatch, tmp_path):
    (tmp_path / "photo.json").write_text('["a cat", "", " a dog ", "\\n"]')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: tmp_path / "photo.json")
    assert prompts.load("hpsv2:photo") == ["a cat", "a dog"]


# --- the command line ---------------------------------------------------------------------------------------------------
def test_arguments_are_strings_files_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("from a file\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n\n"))
    assert prompts.from_arguments(["a cat", str(tmp_path / "p.txt"), "-"]) == ["a cat", "from a file", "from stdin"]


def test_a_missing_txt_is_an_error_not_a_prompt():
    with pytest.raises(RequestError, match="nowhere.txt: no such prompt file"):
        prompts.from_arguments(["a cat", "nowhere.txt"])


def test_a_sentence_with_a_dot_is_a_prompt():
    assert prompts.from_arguments(["a cat. A dog.", "v1.5"]) == ["a cat. A dog.", "v1.5"]


def test_empty_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(RequestError, match="no prompts"):
        prompts.from_arguments(["-"])
