"""Docstrings write formulas in reST; give them the delimiters that the site reads."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::[ ]*\n(?:[ ]*\n)*((?:\1[ ]+\S.*(?:\n|\Z))+)", re.MULTILINE)


def _display(block: re.Match[str]) -> str:
    indent, formula = block[1], dedent(block[2]).strip()
    lines = ["", r"\[", *formula.splitlines(), r"\]", "", ""]
    return "\n".join(indent + line if line else "" for line in lines)


def to_markdown(docstring: str) -> str:
    """Replace math roles and directives by the delimiters that arithmatex reads."""
    docstring = _BLOCK.sub(_display, docstring)
    return _ROLE.sub(lambda role: rf"\({' '.join(role[1].split())}\)", docstring)


class DocstringMath(Extension):  # type: ignore[misc]
    """Rewrite the formulas of every docstring that mkdocstrings reads."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
