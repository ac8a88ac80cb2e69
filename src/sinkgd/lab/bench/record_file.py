"""Records of measurements as JSON files: nested dataclasses, written whole, read back equal."""

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sinkgd.lab.disk import parse_json, write_whole
from sinkgd.lab.results import ResultsError

Record = TypeVar("Record")


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON; the folder is made when absent."""
    write_whole(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read what `write_record` wrote.

    Raises:
        ResultsError: If the file is no JSON, or holds another kind of record.
    """
    try:
        record: Record = _read(kind, parse_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} holds no {kind.__name__}: {error!r}") from error
    return record


def _read(kind: Any, value: Any) -> Any:
    """Return plain JSON as ``kind``: a dataclass, a tuple of one type, an optional, or as it is."""
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
                if field.name in value  # an older record lacks a newer field, which has a default
            }
        )
    return value
