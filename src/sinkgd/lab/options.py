"""Checks of what a user gives to an option, and the words of remedies."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**63 - 1
LARGEST_VALUE = 1e30


def suggest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest name, if any, and all names.

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


# The parser's messages about a value of a wrong type, and a plain word for the type.
_KINDS = {
    "FLOAT": "a number",
    "INT": "a whole number",
    "could not convert string to float": "a number",
    "invalid literal for int() with base 10": "a whole number",
}
_WRONG_TYPE = (
    re.compile(
        r"Error parsing --(?P<option>\S+): no type matching (\{None\}\|)?(?P<kind>FLOAT|INT) could "
        r"be instantiated from \[(?P<value>.*)\]\.?"
    ),
    re.compile(
        r"Error parsing --(?P<option>\S+): (?P<kind>could not convert string to float|invalid "
        r"literal for int\(\) with base 10): (?P<value>.*)"
    ),
)
_WRONG_CHOICE = re.compile(
    r"invalid choice (?P<value>.*) for argument '--(?P<option>\S+)'\. Expected one of "
    r"\((?P<choices>.*)\)\."
)


def plain(message: str) -> str:
    """Return the parser's message about a wrong value in plain words; other messages as they are.

    Examples:
        >>> plain("Error parsing --seeds: invalid literal for int() with base 10: 'two'")
        "seeds must be a whole number, got 'two'"
    """
    for pattern in _WRONG_TYPE:
        if found := pattern.fullmatch(message):
            return f"{found['option']} must be {_KINDS[found['kind']]}, got {found['value']}"
    if found := _WRONG_CHOICE.fullmatch(message):
        return f"{found['option']} must be one of {found['choices']}; got {found['value']}"
    return message


def how_to_install(extra: str) -> str:
    """Say how to install an extra of this package, which is not on PyPI.

    >>> how_to_install("wandb")
    "in a clone of the repository, run: pip install '.[wandb]'"
    """
    return f"in a clone of the repository, run: pip install '.[{extra}]'"


class NumberError(ValueError):
    """A number that is out of range or not finite; the message gives its option and value."""


def check_numbers(options: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite or too far from 0, in every field of a dataclass.

    Args:
        options: A dataclass, whose fields may be dataclasses too.
        prefix: Prefix of the fields' names, empty or ending in a dot.

    Raises:
        NumberError: If a number is not finite or too far from 0; the message gives its field and
            value.
    """
    for field in fields(options):
        value, name = getattr(options, field.name), prefix + field.name
        if is_dataclass(value):
            shown = "" if field.name in ("settings", "shared") else f"{name}."
            check_numbers(value, shown)
        elif type(value) is int:
            largest = LARGEST_SEED if field.name == "seed" else LARGEST_COUNT
            _check_within(name, value, largest, f"{largest}")
        elif type(value) is float and not math.isfinite(value):
            raise NumberError(f"{name} is {value}; give a finite number")
        elif type(value) is float:
            _check_within(name, value, LARGEST_VALUE, f"{LARGEST_VALUE:g}")


def _check_within(name: str, value: float, largest: float, words: str) -> None:
    if value > largest:
        raise NumberError(f"{name} is {value}; it must be at most {words}")
    if value < -largest:
        raise NumberError(f"{name} is {value}; it must be at least -{words}")
