"""Turn a corpus into a folder of token shards, in bounded memory, and cache such folders."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from sinkgd.lab.data.corpus import SPLITS, Corpus, Document, open_corpus
from sinkgd.lab.data.dataset import FORMAT_VERSION, MANIFEST_FILE, Manifest, offsets_file
from sinkgd.lab.data.documents import EMBEDDED, DataError, expanded
from sinkgd.lab.data.shards import SHARD_TOKENS, FolderTakenError, ShardWriter, refuse_taken
from sinkgd.lab.data.tokenizer import VOCAB_SIZE, Tokenizer
from sinkgd.lab.disk import claim_folder

# A larger sample does not improve a tokenizer, and the sample's word counts must fit in memory.
_TOKENIZER_CHARACTERS = 256 * 2**20
# Size of a batch for the tokenizer: enough work for all cores, and little memory.
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 4 * 2**20, 4096


@dataclass(frozen=True)
class Progress:
    """Progress of a preparation; ``total_documents`` is None if it is not known."""

    stage: str  # "tokenizer" while it is trained, then "tokens"
    documents: int
    characters: int
    total_documents: int | None


ProgressCallback = Callable[[Progress], None]


def ignore(_message: str) -> None:
    """Ignore a message."""


def train_tokenizer(
    corpus: Corpus, vocab_size: int = VOCAB_SIZE, *, progress: ProgressCallback | None = None
) -> Tokenizer:
    """Train a byte-level BPE on the first training documents, up to about 268M characters."""
    documents = _reported(corpus, "tokenizer", progress)
    texts = (document.text for document in documents if document.split == "train")
    return Tokenizer.train(_first_characters(texts, _TOKENIZER_CHARACTERS), vocab_size)


def prepare(
    corpus: Corpus,
    out: Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Tokenize ``corpus`` into the folder ``out``; if that fails, nothing is left there.

    Documents without a single token are skipped.

    Args:
        corpus: The documents. A few megabytes of text are in memory at a time, or one document if
            it is longer.
        out: The folder to make. If it exists, it must be empty; a link is followed.
        tokenizer: A result of `train_tokenizer` or `load_tokenizer`.
        shard_tokens: Tokens in a full shard.
        progress: Called after every document.

    Raises:
        DataError: If a document cannot be read, a split gets no document, or the disk is full.
        FolderTakenError: If ``out`` exists and is not an empty folder that can be replaced.
    """
    with ShardWriter(
        out,
        tokenizer,
        corpus.sources,
        shard_tokens=shard_tokens,
        cut_fraction=corpus.cut_fraction,
    ) as writer:
        documents = _reported(corpus, "tokens", progress)
        for batch in _batched(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if ids.size:
                    writer.add(document.split, ids, len(document.text.encode("utf-8")))
        _check_splits(writer)
        return writer.commit()


def prepared_corpus(
    source: str | Path = EMBEDDED,
    *,
    vocab_size: int = VOCAB_SIZE,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = ignore,
) -> Path:
    """Return a folder of shards for ``source``, made on first use and cached.

    The cache is in ``$SINKGD_CACHE``, else ``$XDG_CACHE_HOME/sinkgd``, else ``~/.cache/sinkgd``.
    A folder's name has a hash of the files' names and content, the vocabulary size and the format.
    If two processes make the same folder at the same time, both do the work and one folder remains.

    Args:
        source: ``"sotu"``, a file, a folder or a glob of texts, which are tokenized by a BPE
            trained on them; or a folder that `prepare` made, which is returned as it is.
        vocab_size: Size of the vocabulary to train.
        progress: Called after every document.
        say: Called with a note on files of a folder that are left out, and one on cut documents.

    Raises:
        DataError: If there is no text at ``source``, or shards without their manifest; or if the
            cache cannot be written.
    """
    if (shards := shards_at(source)) is not None:
        Manifest.read(shards)
        return shards
    corpus = open_corpus([str(source)])
    if (note := corpus.note_on_left_out()) is not None:
        say(note)
    key = f"{FORMAT_VERSION} {vocab_size} {corpus.fingerprint()}"
    name = re.sub(r"[^\w-]+", "", Path(source).stem) or "corpus"
    folder = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / MANIFEST_FILE).exists():
        _claim_cache(folder.parent)
        try:
            refuse_taken(folder)
            if (note := corpus.note_on_cuts()) is not None:
                say(note)
            tokenizer = train_tokenizer(corpus, vocab_size, progress=progress)
            prepare(corpus, folder, tokenizer, progress=progress)
        except FolderTakenError:
            if not (folder / MANIFEST_FILE).exists():
                raise
    return folder


def shards_at(source: str | Path) -> Path | None:
    """Return the folder ``source`` if it holds shards; None if ``source`` names texts."""
    if str(source) == EMBEDDED:
        return None
    folder = expanded(str(source))
    marks = (MANIFEST_FILE, offsets_file("train"), offsets_file("validation"))
    return folder if any((folder / name).exists() for name in marks) else None


def cache_folder() -> Path:
    """Return the folder of cached corpora, which may not exist yet."""
    if own := os.environ.get("SINKGD_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "sinkgd"
    return Path.home() / ".cache" / "sinkgd"


def _claim_cache(folder: Path) -> None:
    try:
        claim_folder(folder)
    except OSError as error:
        raise DataError(
            f"prepared texts are kept in {folder}, which cannot be written ({error}); set the "
            "variable SINKGD_CACHE to another folder"
        ) from error


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    read = 0

    def below_limit(text: str) -> bool:
        nonlocal read
        read += len(text)
        return read - len(text) < limit

    return takewhile(below_limit, texts)


def _reported(corpus: Corpus, stage: str, report: ProgressCallback | None) -> Iterator[Document]:
    # Parts of cut documents count as documents, so the total number is unknown.
    total = corpus.total_documents if corpus.cut_fraction is None else None
    characters = 0
    for count, document in enumerate(corpus, start=1):
        yield document
        characters += len(document.text)
        if report:
            report(Progress(stage, count, characters, total))


def _check_splits(writer: ShardWriter) -> None:
    counts = {split: writer.documents(split) for split in SPLITS}
    empty = [split for split, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"no document is left for {' and '.join(empty)}: only {sum(counts.values())} documents "
            "in all have a token; give more text, or another tokenizer with "
            "`sinkgd prepare --tokenizer`"
        )
