"""Files: read without surprises, written whole, and safe from a power cut."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def parse_json(content: str | bytes) -> Any:
    """Parse JSON; a byte order mark is allowed.

    Raises:
        ValueError: If it is no JSON, is not UTF-8, or is nested more deeply than Python can read.

    Examples:
        >>> parse_json(b'{"steps": 3}')
        {'steps': 3}
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_whole(path: Path, content: str) -> None:
    """Put a file at ``path`` in one move: no reader ever sees half of it. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's own entries to the disk: the names in it, not the files' content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
