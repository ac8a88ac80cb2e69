"""The fenced blocks of the README and the documents."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    """A piece of a page, and where it begins."""

    place: str
    text: str


def snippets(*languages):
    """List the fenced blocks of all pages in one of the languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            line = text.count("\n", 0, fence.start()) + 1
            if fence[1] in languages:
                found.append(Snippet(f"{page.name}:{line}", fence[2]))
    return found


def run_block_with(module):
    """Run the only Python block that imports from ``module``; return its names."""
    (block,) = (s for s in snippets("python") if f"from {module}" in s.text)
    names = {"__name__": "__main__"}
    exec(compile(block.text, block.place, "exec"), names)
    return names
