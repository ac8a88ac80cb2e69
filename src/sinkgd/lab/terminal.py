"""Text for terminals that cannot show all of it: ASCII, cp1252, and names that are no UTF-8."""

import codecs
import sys
import unicodedata
from typing import TextIO

ERRORS = "sinkgd.readable"
# What pages and tables use beyond ASCII, where a plain equivalent exists.
_PLAIN = {
    "×": "x",
    "·": "*",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "√": "sqrt",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "→": "->",
    "←": "<-",
    "α": "alpha",
    "β": "beta",
    "θ": "theta",
    "τ": "tau",
    "σ": "sigma",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "│": "|",
    "─": "-",
    "━": "-",
    "╭": "+",
    "╮": "+",
    "╰": "+",
    "╯": "+",
}


def readable(error: UnicodeError) -> tuple[str, int]:
    r"""Replace characters that an encoding lacks: by a plain one where there is one, else escaped.

    Examples:
        >>> "1 × √n ≤ 2, naïve ☃".encode("ascii", ERRORS)
        b'1 x sqrtn <= 2, naive \\u2603'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_plain, text)), error.end


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    base = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return base or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(ERRORS, readable)


def make_readable(*streams: TextIO | None) -> None:
    """Let streams replace what they cannot encode instead of raising; by default this process's."""
    for stream in streams or (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ERRORS)
