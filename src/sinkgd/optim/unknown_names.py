"""Arguments that do not exist: they are refused with the nearest one that does."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Arguments of `param_groups` alone, and the call that takes each.
OF_PARAM_GROUPS: Mapping[str, str] = MappingProxyType(
    {
        name: f"param_groups(model, {name}=...)"
        for name in ("matrix_lr_scale", "matrix_algorithm", "betas", "overrides", "base_width")
    }
)

# What other optimizers call an argument.
_SYNONYMS = MappingProxyType({"learning_rate": "lr", "wd": "weight_decay"})


def unknown_name(
    caller: str, name: str, names: Iterable[str], elsewhere: Mapping[str, str] = OF_PARAM_GROUPS
) -> str:
    """Return what is wrong with an argument that does not exist, and the remedy.

    Args:
        caller: The function or class, as errors call it.
        name: The argument.
        names: The arguments that exist.
        elsewhere: Arguments of what is called before or after, and the call that takes each.
    """
    names = list(names)
    said = f"{caller} has no argument {name!r}"
    if name in elsewhere:
        return f"{said}; write {elsewhere[name]}"
    if close := _nearest(name, names):
        return f"{said}; did you mean {close!r}?"
    if other := _nearest(name, elsewhere):
        return f"{said}; did you mean {elsewhere[other]}?"
    return f"{said}; it takes {', '.join(names)}"


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return which of ``names`` a misspelled name, or one word of a name, may stand for."""
    names = list(names)
    if _SYNONYMS.get(name) in names:
        return _SYNONYMS[name]
    close = difflib.get_close_matches(name, names, n=1)
    longer = [known for known in names if name in known.split("_")]
    return next(iter([*close, *longer]), None)


def suggest_names(
    elsewhere: Mapping[str, str] = OF_PARAM_GROUPS, passes_to: Callable[..., object] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function or a constructor refuse unknown arguments with the nearest name.

    Its signature stays what it is.

    Args:
        elsewhere: Arguments of what is called before or after, and the call that takes each.
        passes_to: What takes its ``**options``: the keyword-only arguments of this one.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        is_init = function.__name__ == "__init__"
        taken = [*inspect.signature(function).parameters.values()][is_init:]
        if passes_to is not None:
            taken = [p for p in taken if p.kind is not p.VAR_KEYWORD]
            inner = inspect.signature(passes_to).parameters.values()
            taken += [p for p in inner if p.kind is p.KEYWORD_ONLY]
        names = [p.name for p in taken]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in names:
                    caller = type(args[0]).__name__ if is_init else function.__name__
                    raise TypeError(unknown_name(caller, name, names, elsewhere))
            return function(*args, **kwargs)

        return checked

    return decorate
