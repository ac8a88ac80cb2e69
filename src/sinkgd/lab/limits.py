"""How large the numbers of options may be, so that what is computed from them stays a number."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**63 - 1
LARGEST_VALUE = 1e30


class NumberError(ValueError):
    """An option that no computation can use, with its name and value."""


def check_numbers(options: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite or too large, in every field of a dataclass.

    Args:
        options: A dataclass, whose fields may be dataclasses too.
        prefix: Of the fields' names, with its dot.

    Raises:
        NumberError: With the field's name and value.
    """
    for field in fields(options):
        value, name = getattr(options, field.name), prefix + field.name
        if is_dataclass(value):
            shown = "" if field.name in ("settings", "shared") else f"{name}."
            check_numbers(value, shown)
        elif type(value) is int:
            largest = LARGEST_SEED if field.name == "seed" else LARGEST_COUNT
            if abs(value) > largest:
                raise NumberError(f"{name} is {value}; it may be at most {largest}")
        elif type(value) is float and not math.isfinite(value):
            raise NumberError(f"{name} is {value}; give a finite number")
        elif type(value) is float and abs(value) > LARGEST_VALUE:
            raise NumberError(f"{name} is {value}; it may be at most {LARGEST_VALUE:g}")
