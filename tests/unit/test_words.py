"""The house's plain English: what must not come back, in documents, docstrings, messages and presets. The list says what to write instead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTEAD = {
    r"\bmend(s|ed|ing)?\b": "repair",
    r"(?<![Tt]here )\bis no (?!longer|more|such)\w": "is not a",
    r"\b(hears?|speaks? of|pleases?|obeys?)\b": "receives, reports, computes: code is not a person",
    r"\b(it|that|which|nothing|code|file|run|page|table|command|\w+`) tells\b": "shows, reports, says",
    r"\b(Interrupted|Failing|Stopped), (the|these|it)\b": "If it was interrupted, the ...",
    r"\b(leaves?|left|leaving) (0|zero) out\b": "exclude 0",
    r"\brewards that part\b|\bthey part\b": "the rewards disagree",
    r"\botherwise than\b": "differently from",
    r"\b(commoner|hither|thereof|whereof)\b": "a common word",
    r"\bfor want of\b": "because there is no",
    r"\bnow and then\b": "sometimes",
    r"^Nor (did|does|is|are)\b|\. Nor (did|does|is|are)\b": "subject, verb, object",
    r"\bWhat is soft\b": "Known weaknesses",
    r"\bby and by\b|\bso to speak\b": "leave it out",
}
PLANTED = {
    "A killed run is mended.": "repair",
    "This is no error.": "is not a",
    "The optimizer hears nothing.": "receives, reports, computes: code is not a person",
    "Interrupted, the same command goes on.": "If it was interrupted, the ...",
    "Intervals leave 0 out.": "exclude 0",
    "It fails. Nor did the other.": "subject, verb, object",
}


def texts():
    """Every file whose words people read."""
    for pattern in ("README.md", "CHANGELOG.md", "docs/**/*.md", "presets/*.toml", "tdpo_cli/**/*.py", "benchmarks/**/*.py", "tests/**/*.py"):
        yield from (path for path in ROOT.glob(pattern) if path.name != "test_words.py")


def found(text):
    """(line number, words, what to write instead) for each phrase of the list."""
    return [
        (number, match.group(0), instead)
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, line)
    ]


@pytest.mark.parametrize(("sentence", "instead"), PLANTED.items())
def test_a_planted_phrase_is_found(sentence, instead):
    assert instead in [words for _, _, words in found(sentence)]


@pytest.mark.parametrize("sentence", ["There is no run there.", "Two seeds are told apart.", "It is no longer read.", "Stopped: see above."])
def test_plain_sentences_pass(sentence):
    assert found(sentence) == []


def test_nothing_on_the_list_is_in_the_project():
    places = [f"{path.relative_to(ROOT)}:{number}: {words!r}: {instead}" for path in texts() for number, words, instead in found(path.read_text())]
    assert places == [], "\n".join(places)
