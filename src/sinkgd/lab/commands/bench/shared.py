"""What the commands of `sinkgd bench` share: checks of options, and the files they write.

A record is a nested dataclass in a JSON file. It is written atomically, and reading it returns an
equal dataclass.
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from rich.console import Console

from sinkgd.lab.disk import parse_json, write_whole
from sinkgd.lab.options import suggest
from sinkgd.lab.results import ResultsError
from sinkgd.lab.train.config import ConfigError, Device
from sinkgd.lab.train.machine import check_threads, select_device, set_threads

Record = TypeVar("Record")


def chosen(
    option: str, value: str, allowed: Iterable[str], *, none: bool = False
) -> tuple[str, ...]:
    """Split the names in an option's value and check them.

    Args:
        option: Name of the option, for errors.
        value: Names separated by commas; ``all`` stands for all of them.
        allowed: The known names.
        none: Whether ``none`` may be chosen.

    Raises:
        ConfigError: If a name is unknown, or the value holds no name.
    """
    names = list(allowed)
    if none and value == "none":
        return ()
    found = tuple(name for part in value.split(",") if (name := part.strip()))
    if not found:
        raise ConfigError(f"{option} is empty; give one or more of {', '.join(names)}")
    for name in found:
        if name not in (*names, "all"):
            raise ConfigError(f"{option} is {name!r}; {suggest(name, names)}, all")
    return tuple(names) if "all" in found else tuple(dict.fromkeys(found))


def check_at_least_one(option: str, value: int) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: If ``value`` is below 1.
    """
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be at least 1")


def check_positive(option: str, value: float) -> None:
    """Refuse numbers that are not above 0.

    Raises:
        ConfigError: If ``value`` is not above 0.
    """
    if not value > 0:
        raise ConfigError(f"{option} is {value}; it must be above 0")


def prepare_device(device: Device, threads: int | None) -> torch.device:
    """Set the number of CPU threads and return the device to measure on.

    Raises:
        ConfigError: If CUDA was asked for and is absent, or ``threads`` is below 1.
    """
    check_threads(threads, option="threads")
    set_threads(threads)
    return select_device(device, option="device")


def command_of(measurement: str, options: Any) -> str:
    """Return the shell command that repeats a measurement, without options at their defaults."""
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


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print the warnings of a measurement, one on each line."""
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def write_measurement(folder: Path, name: str, record: Any, page: str, console: Console) -> None:
    """Write ``name.json`` and ``name.html`` into a folder, and print their paths."""
    path = folder / f"{name}.json"
    write_record(path, record)
    write_whole(path.with_suffix(".html"), page)
    for written in (path, path.with_suffix(".html")):
        console.print(f"written: {written}", markup=False, highlight=False, soft_wrap=True)


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON, and make the folder if it is absent."""
    write_whole(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read what `write_record` wrote.

    Raises:
        ResultsError: If the file is not JSON, or holds another kind of record.
    """
    try:
        record: Record = _read(kind, parse_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} holds no {kind.__name__}: {error!r}") from error
    return record


def _read(kind: Any, value: Any) -> Any:
    """Return plain JSON as ``kind``: a dataclass, a tuple of one type, an optional or a scalar."""
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], item) for item in value)
    if is_dataclass(kind) and isinstance(kind, type):
        kinds = get_type_hints(kind)
        return kind(
            **{
                field.name: _read(kinds[field.name], value[field.name])
                for field in fields(kind)
                if field.name in value  # older records lack newer fields, which have defaults
            }
        )
    return value
