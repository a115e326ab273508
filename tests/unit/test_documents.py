"""Every `tdpo` command and Python block of README.md and docs/ runs here, is run by a test that its page names, or is marked with what it needs.

A mark is an HTML comment at the end of the text before a block: `<!-- needs weights -->` for all of it, `<!-- needs a GPU: train, serve -->` for
its lines with these words, `<!-- run with 2 for 3000 -->` where a repetition is shortened. `<!-- run by tests/FILE.py -->` stands for a whole page.
"""

import ast
import html
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import tdpo
from test_use_the_result import SAMPLING, TRAINED

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md")]  # that one is generated
REASONS = {"weights", "a GPU", "an hour", "several machines"}
PLACEHOLDERS = {"RUN": "runs/quickstart-0001"}
COMMAND = re.compile(r"^\s*(tdpo|python|torchrun|srun)\b|-m tdpo_cli")


@dataclass(frozen=True)
class Block:
    place: str  # page:line
    language: str  # of the fence; empty where the block is indented
    text: str
    mark: str  # what the comment before it says

    @property
    def python(self):
        return self.text if self.language == "python" else "\n".join(re.findall(r"^python - <<'END'\n(.*?)^END$", self.text, re.S | re.M))

    @property
    def commands(self):
        """Lines of a shell, without comments, joined where they go on."""
        shell = re.sub(r"^python - <<'END'\n(.*?)^END$", "", self.text, flags=re.S | re.M).replace("\\\n", "")
        lines = [line.partition("  #")[0].strip() for line in shell.splitlines() if COMMAND.search(line)]
        return lines if self.language in ("", "sh", "bash") else []


def blocks(page, text):
    """Fenced and indented blocks with a command or Python in them."""
    found = []
    pattern = r"^```(?P<language>\w*).*\n(?P<fenced>(?:.*\n)*?)```$|(?<=\n\n)(?P<indented>(?:    .*\n|\n(?=    ))+)"
    for match in re.finditer(pattern, text, re.M):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        mark = re.search(r"<!-- (.+) -->$", before)
        inside = match["fenced"] if match["indented"] is None else re.sub(r"^    ", "", match["indented"], flags=re.M)
        block = Block(f"{page}:{text[: match.start()].count(chr(10)) + 1}", match["language"] or "", inside, mark[1] if mark else "")
        found += [block] if block.commands or block.python else []
    return found


def run_elsewhere(page, text):
    """The test that runs this page, if its comment names one."""
    named = re.search(r"<!-- run by (tests/\S+\.py) -->", text)
    if named:
        assert page in (ROOT / named[1]).read_text(), f"{page}: {named[1]} does not read it"
    return named is not None


def left_to_run(block):
    """(Python, commands) of a block that are not marked."""
    if not block.mark.startswith("needs "):
        return block.python, block.commands
    marked = []
    for reason, _, words in (part.partition(": ") for part in block.mark.removeprefix("needs ").split("; ")):
        assert reason in REASONS, f"{block.place}: needs {reason}: expected one of {sorted(REASONS)}"
        if not words:
            return "", []
        marked += words.split(", ")
    assert all(any(word in line for line in block.commands) for word in marked), f"{block.place}: a word that no line has: {marked}"
    return block.python, [line for line in block.commands if not any(word in line for word in marked)]


ALL = [block for page in PAGES if not run_elsewhere(page, text := (ROOT / page).read_text()) for block in blocks(page, text)]


def test_blocks_are_found_with_their_marks_and_commands():
    text = "See this: <!-- needs a GPU: train -->\n\n    tdpo train --gpus 8  # slow\n    tdpo presets \\\n        NAME\n\n```python\n1 + 1\n```\n"
    shell, python = blocks("page", text)
    assert (shell.place, shell.commands, shell.python) == ("page:3", ["tdpo train --gpus 8", "tdpo presets     NAME"], "")
    assert left_to_run(shell) == ("", ["tdpo presets     NAME"])
    assert (python.python, python.commands, python.mark) == ("1 + 1\n", [], "")
    with pytest.raises(AssertionError, match="needs luck"):
        left_to_run(Block("page:1", "", "tdpo train", "needs luck"))
    assert len(ALL) > 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run that pages speak about, one epoch long."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "tiny.toml").write_text(TRAINED)
    (folder / "prompts.txt").write_text("a red circle on a blue background\na yellow square on a teal background\n")
    held_out = ["--set", f"rollout.eval_prompts={folder / 'prompts.txt'}"]
    outcome = tdpo("train", "--preset", folder / "tiny.toml", "--out", folder / "runs/quickstart-0001", *SAMPLING, *held_out)
    assert outcome.status == 0, outcome.err
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        outcome = tdpo("sample", "base", "prompts.txt", "--preset", "tiny.toml", *SAMPLING)
    assert outcome.status == 0 and (folder / "samples/base-0001").is_dir(), outcome.err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in ALL if any(left_to_run(block))], ids=lambda block: block.place)
def test_a_block_runs(block, place, monkeypatch):
    monkeypatch.chdir(place)
    python, commands = left_to_run(block)
    if block.mark.startswith("run with "):
        less, more = block.mark.removeprefix("run with ").split(" for ")
        assert python.count(more) == 1, f"{block.place}: {more} is not there once"
        python = python.replace(more, less)
    exec(compile(ast.parse(python), block.place, "exec"), {"__name__": "page"})
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "tdpo", f"{block.place}: {line}: neither run nor marked with what it needs"
        outcome = tdpo(*(PLACEHOLDERS.get(argument, argument) for argument in arguments))
        assert outcome.status == 0, f"{block.place}: {line}\n{outcome.err}"


def test_a_block_that_is_not_marked_is_one_that_can_run():
    cannot = [f"{block.place}: {line}" for block in ALL for line in left_to_run(block)[1] if not line.startswith("tdpo ")]
    assert cannot == [], "mark it with what it needs: " + "; ".join(cannot)


def test_the_recording_is_a_run_from_header_to_verdict_and_loads_nothing():
    svg = (ROOT / "docs/quickstart.svg").read_text()
    words = html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).replace("\xa0", " ")
    for word in ("$ tdpo train --preset quickstart", "training with TDPO-R", " 0/24 ", "24/24 ", "verdict: aesthetic "):
        assert word in words, word
    assert re.findall(r"(?:href|src)=|@import|url\((?!#)", svg) == []
