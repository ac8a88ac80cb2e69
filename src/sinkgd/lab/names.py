"""Names that a user mistyped: which one was meant, and which there are."""

import difflib
from collections.abc import Iterable


def suggest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the likely one, if any, and all there are.

    Examples:
        >>> suggest("adanw", ["adamw", "swan"])
        "did you mean 'adamw'? There are adamw, swan"
        >>> suggest("tiny", ["llama-60m", "all"])
        'there are llama-60m, all'
    """
    known = list(names)
    listed = ", ".join(known)
    alike = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {alike[0]!r}? There are {listed}" if alike else f"there are {listed}"
