"""The pages about the command line say what the program does."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def reference():
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.text()


def test_the_reference_is_what_the_program_says():
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "write it again: python docs/make_commands.py"


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md")])
def test_commands_in_a_page_use_options_that_exist(page):
    known = {section.split("\n", 1)[0]: set(re.findall(r"`(--?[a-z][a-z-]*)`", section)) for section in reference().split("\n## tdpo ")[1:]}
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (?:.*-m )?tdpo(?:_cli)? (.*)$", text, re.M):
        line = line.split("#")[0]
        command = line.split()[0] if line.split() else ""
        if command.startswith("-"):
            continue
        assert command in known, f"{page}: tdpo {line}"
        used = set(re.findall(r"(?<=\s)(--[a-z][a-z-]*)", line))
        assert used <= known[command] | {"--help"}, f"{page}: tdpo {line}: {used - known[command]}"
