"""Options of measurements: names with commas between, checked; counts; the device; the command."""

import shlex
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from sinkgd.lab.names import suggest
from sinkgd.lab.train.config import ConfigError, Device
from sinkgd.lab.train.device import check_threads, select_device, set_threads


def chosen(
    option: str, value: str, allowed: Iterable[str], *, none: bool = False
) -> tuple[str, ...]:
    """Split an option's names and check them.

    Args:
        option: Its name, for the error.
        value: Names with commas between, or ``all``.
        allowed: The names there are.
        none: Whether ``none`` may be chosen.

    Raises:
        ConfigError: If a name is unknown, or there is none.
    """
    names = list(allowed)
    if value == "all":
        return tuple(names)
    if none and value == "none":
        return ()
    found = tuple(name for part in value.split(",") if (name := part.strip()))
    if not found:
        raise ConfigError(f"{option} is empty; give names of {', '.join(names)}")
    for name in found:
        if name not in names:
            raise ConfigError(f"{option} is {name!r}; {suggest(name, names)}, all")
    return tuple(dict.fromkeys(found))


def check_at_least_one(option: str, value: int) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: If it is below.
    """
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be at least 1")


def check_positive(option: str, value: float) -> None:
    """Refuse times that are not above 0.

    Raises:
        ConfigError: If it is not.
    """
    if not value > 0:
        raise ConfigError(f"{option} is {value}; it must be above 0")


def prepare_device(device: Device, threads: int | None) -> torch.device:
    """Return the device to measure on, with so many CPU threads set.

    Raises:
        ConfigError: If CUDA was asked for and there is none, or ``threads`` is below 1.
    """
    check_threads(threads, option="threads")
    set_threads(threads)
    return select_device(device, option="device")


def command_of(measurement: str, options: Any) -> str:
    """Return the shell command with these options, those that are not at their defaults."""
    return shlex.join(["sinkgd", "bench", measurement, *_changed(options, "--")])


def _changed(options: Any, prefix: str) -> list[str]:
    words: list[str] = []
    for field in fields(options):
        value, option = getattr(options, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            words += _changed(value, f"{option}.")
        elif value != field.default and isinstance(value, bool):
            words.append(option if value else f"{prefix}no-{option.removeprefix(prefix)}")
        elif value != field.default:
            words += [option, str(value)]
    return words
