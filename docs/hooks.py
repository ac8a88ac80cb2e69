"""The site shows the pages of recorded studies, which lie outside of ``docs``.

In the repository a study's link leads to its verdict, which reads well there; on the site, to its
page. Other records and the examples are not on the site, so their links become paths.

Formulas become MathML while the site is built, so a browser shows them without a script.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_VERDICT = re.compile(r"\(\.\./benchmarks/studies/([\w-]+)/verdict\.md\)")
_RECORD = re.compile(r"\[([^\]]+)\]\(\.\./((?:benchmarks|examples)/[^)]+)\)")

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, as ``studies/NAME.html``."""
    records = Path(config.docs_dir).parent / "benchmarks/studies"
    for page in sorted(records.glob("*/report.html")):
        address = f"studies/{page.parent.name}.html"
        files.append(File.generated(config, address, abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links to verdicts lead to the pages, and turn links to other records into paths."""
    up = "../" * page.file.src_uri.count("/")
    with_studies = _VERDICT.sub(rf"({up}studies/\1.html)", markdown)
    return _RECORD.sub(r"\1 (`\2`)", with_studies)


def _mathml(formula: re.Match[str]) -> str:
    tag, opening, latex = formula.groups()
    display = "block" if opening == "[" else "inline"
    return (
        f'<{tag} class="formula">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'
    )


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas that arithmatex marked into MathML."""
    return _FORMULA.sub(_mathml, content)
