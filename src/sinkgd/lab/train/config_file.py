"""Configurations as TOML files and as command lines, both ways."""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from sinkgd.lab.disk import write_whole
from sinkgd.lab.train.config import ConfigError, RunConfig, SharedConfig

Table = TypeVar("Table")


def load_config(path: Path, kind: type[Table]) -> Table:
    """Read a TOML file into ``kind``, a dataclass of dataclasses; what is absent has its default.

    Args:
        path: The file.
        kind: `RunConfig`, or another dataclass whose fields are tables.

    Raises:
        ConfigError: If the file is missing, empty or no TOML, or a key is unknown or of another
            type.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"there is no configuration file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the configuration file in it") from None
    except RecursionError:
        raise ConfigError(f"{path} is no TOML file: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty; give a configuration file, or leave the option out")
    return read_tables(content, kind, path)


def read_tables(content: Mapping[str, Any], kind: type[Table], source: Path) -> Table:
    """Read nested tables into ``kind``, a dataclass of dataclasses; what is absent has its default.

    Args:
        content: From a TOML file, or as `as_tables` returns it.
        kind: `RunConfig`, or another dataclass whose fields are tables.
        source: Where they were read, for errors.

    Raises:
        ConfigError: If a key is unknown or of another type.
    """
    return _read_table(kind, content, source, prefix="")


def save_config(path: Path, config: RunConfig) -> None:
    """Write ``config`` as TOML; fields that are None are left out."""
    write_whole(path, tomli_w.dumps(as_tables(config)))


def as_tables(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested dicts for TOML and JSON; fields that are None are left out."""
    return {
        table: {key: _plain(value) for key, value in content.items() if value is not None}
        for table, content in asdict(config).items()
    }


def command_line(config: SharedConfig) -> list[str]:
    """Return the options of a command that give ``config``, those that differ from its defaults.

    Examples:
        >>> from sinkgd.lab.train.config import OptimizerConfig
        >>> command_line(RunConfig(optimizer=OptimizerConfig(recipe="adamw", lr=0.01)))
        ['--optimizer.recipe', 'adamw', '--optimizer.lr', '0.01']
    """
    options = []
    for name, _, value in differences(type(config)(), config):
        options.append(f"--{name.replace('_', '-')}")
        options.extend(map(str, value) if isinstance(value, tuple) else [str(value)])
    return options


def differences(old: SharedConfig, new: SharedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``table.field`` with both values, wherever ``old`` and ``new`` differ."""
    for table in fields(old):
        before, after = getattr(old, table.name), getattr(new, table.name)
        for field in fields(before):
            values = getattr(before, field.name), getattr(after, field.name)
            if values[0] != values[1]:
                yield (f"{table.name}.{field.name}", *values)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that looks most like ``name``."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_table(kind: type[Table], content: Mapping[str, Any], path: Path, prefix: str) -> Table:
    kinds = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            likely = f"{prefix}{nearest(key, kinds)}"
            raise ConfigError(f"{path}: unknown key {name}; did you mean {likely}?")
        if is_dataclass(kinds[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}: {name} must be a table [{name}], got {value!r}")
            values[key] = _read_table(kinds[key], value, path, prefix=f"{name}.")
        else:
            values[key] = _read_value(kinds[key], value, path, name)
    return kind(**values)


def _read_value(kind: Any, value: Any, path: Path, name: str) -> Any:
    """Return ``value`` as ``kind``: a plain type, a Literal, a tuple of one, or one of these."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read_value(get_args(kind)[0], item, path, name) for item in value)
    if get_origin(kind) in (Union, UnionType):
        kind = next(member for member in get_args(kind) if member is not type(None))
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        allowed = ", ".join(map(repr, get_args(kind)))
        raise ConfigError(f"{path}: {name} must be one of {allowed}; got {value!r}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{path}: {name} must be of type {expected}, got {value!r}")
    return value
