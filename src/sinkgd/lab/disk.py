"""Files: writes that a power cut cannot leave half done, and remedies for errors."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The disk or the quota is full, or the file would become larger than the system allows.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Errors that the user can avoid by giving another path.
PATH_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


def remedy_of(error: OSError) -> str | None:
    """Return a remedy for an error of the system, or None if its errno alone suggests none.

    Examples:
        >>> remedy_of(FileExistsError(errno.EEXIST, "File exists", "runs"))
        'move away what is there, or give another path'
    """
    if error.errno in FULL:
        return "make room there, or write elsewhere"
    if error.errno == errno.EMFILE:
        return "allow this process more open files, e.g. `ulimit -n 4096`"
    if error.errno == errno.ENFILE:
        return "the whole system has too many open files; end other programs, or raise its limit"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "move away what is there, or give another path"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "change its permissions, or give another path"
    return "give another path" if error.errno in PATH_ERRORS else None


def parse_json(content: str | bytes) -> Any:
    """Parse JSON; bytes may begin with a byte order mark.

    Raises:
        ValueError: If ``content`` is not JSON, is not UTF-8, or is nested more deeply than Python
            can read.

    Examples:
        >>> parse_json(b'{"steps": 3}')
        {'steps': 3}
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Add ``path`` to errors without a file name, such as those of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def is_special(path: Path) -> bool:
    """Whether ``path`` exists and is not a regular file, e.g. a FIFO, which may block a reader."""
    return path.exists() and not path.is_file()


def claim_folder(path: Path) -> None:
    """Create a folder and check that it is writable, before long work whose results go there.

    Raises:
        OSError: If the folder cannot be created or is not writable.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def claim_file(path: Path) -> None:
    """Create the folder of a file and check that the file can be written, before long work.

    A device or a pipe is not checked.

    Raises:
        OSError: If ``path`` is a folder, or the folder cannot be created or is not writable.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not is_special(path):
        claim_folder(path.parent)


def write_whole(path: Path, content: str) -> None:
    """Write a file atomically: no reader ever sees half of it. Its folder is created if absent.

    A device or a pipe, such as /dev/null or /dev/stdout, is written to, not replaced.
    """
    if is_special(path):
        with naming_path(path), path.open("w", encoding="utf-8") as file:
            file.write(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with naming_path(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are private to their owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk: the names of its files, not their content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
