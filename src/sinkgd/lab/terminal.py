"""Text for terminals that cannot show every character, and output for terminals that are gone.

Characters that an encoding such as ASCII or cp1252 lacks, and file names that are not UTF-8, are
replaced. If the terminal is closed, what is written to standard error is lost, but the process goes
on.
"""

import codecs
import io
import sys
import unicodedata
from typing import Any, TextIO

ERRORS = "sinkgd.readable"
# Characters beyond ASCII in pages and tables, each with a plain equivalent.
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
    r"""Replace characters that an encoding lacks by a plain equivalent, or escape them.

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
    """Make streams replace what they cannot encode; by default the standard streams."""
    for stream in streams or (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ERRORS)


class LastingStream(io.TextIOWrapper):
    """A stream that discards what it cannot write, e.g. to a closed terminal or a full disk.

    Args:
        descriptor: Descriptor of the file, which stays open.
        encoding: Encoding of the text.
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
    """Let this process go on after its standard error is closed."""
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:  # not replaced, e.g. by a test
        sys.stderr = LastingStream(sys.stderr.fileno(), sys.stderr.encoding)
