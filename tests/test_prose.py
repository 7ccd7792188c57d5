"""Plain English on pages and in tutorials: short sentences, few passives, few clauses within a sentence.

proselint, which runs without a network, looks at none of these, and takes code for prose. So there are a few
rules here. Every cell of a table and item of a list counts by itself, and code in a line counts as one word.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [
    "index", "faq", "gallery", "compare", "command-line", "loggers", "training", "limits", "cost", "versions", "lla",
    "spectrum", "landscape", "papers", "concepts/*", "guides/*",
]  # fmt: skip
# theory.md is left out: its sentences are definitions and conditions, and shorter ones would lose what they hold for.
# study.md is left out, too: a program writes it, so its sentences are built from numbers and words of studies/.
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(page for name in GUIDES for page in sorted((ROOT / "docs").glob(f"{name}.md"))),
    *sorted((ROOT / "tutorials").glob("*.ipynb")),
]

MOST_WORDS = 28  # of a sentence
MOST_CLAUSES = 3  # that begin with a word like "which" in one sentence
MOST_PASSIVES = 2  # in one sentence
MOST_PASSIVE = 0.3  # share of a page's sentences that have a passive

PARTICIPLE = (
    r"(?:\w+ed|begun|born|bound|brought|built|caught|chosen|cut|done|drawn|driven|fed|felt|found|given|held|hidden|kept|"
    r"known|laid|left|lost|made|meant|paid|put|read|run|said|seen|sent|set|shown|shut|spent|split|taken|taught|thought|"
    r"told|understood|written)"
)
PASSIVE = re.compile(rf"\b(?:is|are|was|were|be|been|being) (?:(?:not|never|also|only|\w+ly) )?{PARTICIPLE}\b", re.I)
CLAUSE = re.compile(
    r"\b(?:which|that|who|whose|where|wherever|if|unless|because|since|although|though|while|whether|when|until|as)\b",
    re.I,
)
INVERTED = re.compile(rf"(?:Not )?{PARTICIPLE}(?: \w+)? (?:is|are|was|were)\b", re.I)  # "Measured are the layers"


def text_of(page):
    """Return the text of a page, or the Markdown cells of a notebook."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(text):
    """Yield paragraphs, items of lists and cells of tables, without markup."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"\*+", "", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.)\s)", text):
        if block.lstrip().startswith("|"):
            yield from block.split("|")
        elif not block.lstrip().startswith("#"):
            yield re.sub(r"^\s*(?:[-*]|\d+\.)\s", "", block)


def sentences(text):
    for block in blocks(text):
        plain = " ".join(block.split())
        yield from filter(
            re.compile(r"\w").search, re.split(r"(?<=[.!?])\)? (?=[A-Z(\"'0-9])|: (?=[A-Z])| ?[;·] ", plain)
        )


def faults(sentence):
    """Return which rules a sentence breaks.

    >>> faults("Measured are the layers that it finds.")
    ['inverted']
    >>> faults("What is measured if it is found when a run that is named is read, as it was written, is said.")
    ['4 clauses', '6 passives']
    >>> faults("One word " * 15)
    ['30 words']
    """
    words, clauses = len(re.findall(r"[\w'’-]+", sentence)), len(CLAUSE.findall(sentence))
    passives = len(PASSIVE.findall(sentence))
    found = {
        f"{words} words": words > MOST_WORDS,
        f"{clauses} clauses": clauses > MOST_CLAUSES,
        f"{passives} passives": passives > MOST_PASSIVES,
        "inverted": INVERTED.match(sentence) is not None,
    }
    return [fault for fault, is_broken in found.items() if is_broken]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sentences_are_plain(page):
    found = list(sentences(text_of(page)))
    assert not [(*faults(sentence), sentence) for sentence in found if faults(sentence)]
    assert sum(map(bool, map(PASSIVE.search, found))) <= MOST_PASSIVE * len(found)
