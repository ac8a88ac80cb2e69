"""Whole checkpoints: which folders are one, which files of them are damaged.

A checkpoint is a folder ``step-00000100`` that was made under another name and renamed when it was
whole; ``checksums.json`` in it has the SHA-256 of every other file, for the disk may damage it
later.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sinkgd.lab.disk import is_special, parse_json, sync_folder

CHECKSUMS = "checksums.json"
METADATA = ".metadata"  # of torch's writer
_PARTIAL = ".partial"
_NAME = re.compile(r"step-([0-9]{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with the file and the remedy."""


@dataclass(frozen=True)
class Found:
    """The latest whole checkpoint, and why each later one was passed over."""

    path: Path
    damages: tuple[str, ...]


def latest_whole(folder: Path) -> Found | None:
    """Return the latest checkpoint whose checksums hold; None where there is no checkpoint.

    Raises:
        CheckpointError: If there are checkpoints, and every one is damaged.
    """
    damages: list[str] = []
    for path in reversed(checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return Found(path, tuple(damages))
        damages.append(damage)
    if damages:
        raise CheckpointError(
            f"no whole checkpoint in {folder}: {'; '.join(damages)}. "
            f"Delete {folder} to begin again from the first step"
        )
    return None


def find_damage(path: Path) -> str | None:
    """Compare every file of a checkpoint with its checksum; name the first that differs."""
    file = path / CHECKSUMS
    try:
        sums = parse_json(_plain(file).read_bytes())
        if METADATA not in sums:
            return f"{path / CHECKSUMS} is damaged: it lacks {METADATA}"
        for name, expected in sums.items():
            if name != Path(name).name:
                return f"{path / CHECKSUMS} is damaged: {name!r} lies outside of the checkpoint"
            file = path / name
            if _checksum(_plain(file)) != expected:
                return f"{file} is damaged: its checksum differs"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    except (ValueError, AttributeError, TypeError) as error:
        return f"{path / CHECKSUMS} is damaged: {error}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints' folders by their steps; half-written ones are none."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def begin(path: Path) -> Path:
    """Make room for a checkpoint and return the folder to write it in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f"step-*{_PARTIAL}"):
        _clear(left_behind)
    partial = _partial_of(path)
    partial.mkdir()
    return partial


def abandon(path: Path) -> None:
    """Delete what there is of a checkpoint that could not be finished."""
    shutil.rmtree(_partial_of(path), ignore_errors=True)


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names."""
    return {path.name: _checksum(path) for path in sorted(files)}


def finish(partial: Path, path: Path, sums: dict[str, str], *, keep: int) -> None:
    """Name a checkpoint that is written, and delete all but the last ``keep``.

    Args:
        partial: From `begin`.
        path: The checkpoint's own name.
        sums: From `checksums`, of all its files.
        keep: How many checkpoints there may be.
    """
    with (partial / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    _clear(path)  # damaged, and a resumed run has come to its step again
    partial.rename(path)
    sync_folder(path.parent)
    for old in checkpoints(path.parent)[:-keep]:
        _clear(old)


def _clear(path: Path) -> None:
    """Delete the folder at ``path``; a file there is no checkpoint of ours and is moved aside."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.rename(path.with_name(f"{path.name}.aside"))


def _partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_PARTIAL}")


def _plain(path: Path) -> Path:
    """Return ``path`` where it is a file, or absent; reading a pipe or a device may never end."""
    if is_special(path):
        raise OSError(errno.EINVAL, "it is no plain file")
    return path


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
