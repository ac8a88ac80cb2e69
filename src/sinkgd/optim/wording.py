"""Words that several messages share."""

from collections.abc import Sequence

MOST_NAMES = 5


def some_of(names: Sequence[str]) -> str:
    """List names, at most `MOST_NAMES` of them, and count the others."""
    left = len(names) - MOST_NAMES
    if left > 0:
        return f"{', '.join(names[:MOST_NAMES])} and {left} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
