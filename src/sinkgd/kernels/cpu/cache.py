"""Where the compiled loops are kept between processes.

numba renews what it cached when the file of the cached function changes; it does not look at the
files of what that function calls. So the folder is named after all that is here, and after the
random bits.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile


@contextmanager
def kept_loops() -> Iterator[None]:
    """While modules are imported here, let numba keep their compiled functions in `folder`."""
    import numba  # noqa: PLC0415 - optional, and half a second to import

    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def holds_loops() -> bool:
    """Say whether the loops were compiled before, so that they are only read."""
    return any(folder().rglob("*.nbc"))


def loops_are_kept() -> bool:
    """Say whether other processes will find what this one compiles."""
    folder()
    return not _temporary.cache_info().currsize


@cache
def folder() -> Path:
    """Return the first folder that can be written: numba's, the package's, the user's, a new one.

    The new one is for this process alone, and removed when it ends.
    """
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "rounding.py"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    name = f"sinkgd-{digest.hexdigest()[:16]}"
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    parents = [chosen] if chosen else [str(here / "__pycache__"), f"{home}/sinkgd"]
    for parent in parents:
        path = Path(parent).expanduser() / name
        if _can_be_written(path):
            return path
    return Path(_temporary().name)


def _can_be_written(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


@cache
def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="sinkgd-")
