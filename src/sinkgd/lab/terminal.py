"""Text for terminals that cannot show all of it: ASCII, cp1252, and names that are no UTF-8.

And for those that are gone: what is written to standard error is then lost, but no work is.
"""

import codecs
import io
import sys
import unicodedata
from typing import Any, TextIO

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


class LastingStream(io.TextIOWrapper):
    """A stream that takes what it cannot write: its terminal was closed, or its disk is full.

    Args:
        descriptor: Of the file, which stays open.
        encoding: Of the text.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        super().__init__(
            io.BufferedWriter(_LastingFile(descriptor, "wb", closefd=False)),
            encoding=encoding,
            errors=ERRORS,
            line_buffering=True,
        )


class _LastingFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def keep_stderr() -> None:
    """Let this process go on when nobody can read its standard error any more."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:  # else replaced, e.g. by a test
        sys.stderr = LastingStream(sys.stderr.fileno(), sys.stderr.encoding)
