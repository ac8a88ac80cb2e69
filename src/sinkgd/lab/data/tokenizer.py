"""A tokenizer: text to token ids and back, with the ids of the special tokens.

Documents are encoded without the special tokens that a tokenizer adds by itself. Instead, each
document in the prepared data ends with one end-of-text token. Text that contains the spelling of a
special token is encoded as ordinary characters, except by a unigram model with that spelling among
its pieces, such as T5's.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from sinkgd.lab.data.documents import DataError

VOCAB_SIZE = 8192
EOS, PAD = "<eos>", "<pad>"
_LONGEST_WORD = 256  # longest word, in characters, that a tokenizer is trained on
_ENDLESS_WORD = re.compile(rf"(\S{{{_LONGEST_WORD}}})(?=\S)")
SMALLEST_VOCAB = 256 + 2  # every byte, EOS and PAD

# Names of the special tokens in published tokenizers, ours first.
_EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]", "[SEP]")
_PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|bos|>", "[BOS]", "[CLS]")


class Tokenizer:
    """A tokenizer of the `tokenizers` library, made safe for preparing data.

    Args:
        backend: The library's object. Its truncation and padding are switched off.
        name: Name of the tokenizer in messages: a file, or a name on the hub.

    Attributes:
        vocab_size: One more than the largest id.
        eos_id: Id of the token that ends each document.
        pad_id: Id of the token that fills rows; ``eos_id`` if the tokenizer has no pad token, which
            is harmless, because padding is masked by position.
        bos_id: Id of the token that begins a text, or None if the tokenizer has no such token; the
            data does not use it.

    Raises:
        DataError: If the tokenizer has no end-of-text token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend, self._name = backend, name
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos_id, pad_id, self.bos_id = map(self._id_of, (_EOS_NAMES, _PAD_NAMES, _BOS_NAMES))
        if eos_id is None:
            raise DataError(
                f"the tokenizer {name} has no end-of-text token; "
                f"add one of {', '.join(_EOS_NAMES)} to its vocabulary"
            )
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id

    def _id_of(self, names: tuple[str, ...]) -> int | None:
        ids = (self._backend.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Self:
        """Train a byte-level BPE; the same texts give the same tokenizer.

        Args:
            texts: Texts to train on. They are read once; memory grows with the number of different
                words in them.
            vocab_size: Number of tokens to make, at least 258. A short text gives fewer.

        Raises:
            DataError: If ``vocab_size`` is below 258.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise DataError(
                f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes and 2 special tokens), "
                f"got {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in _without_endless_words(text))
        backend.train_from_iterator(pieces, trainer=trainer)
        return cls(backend, "trained here")

    @classmethod
    def from_file(cls, file: Path) -> Self:
        """Load a ``tokenizer.json``, or the one in the folder ``file``."""
        path = file / "tokenizer.json" if file.is_dir() else file
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"no tokenizer at {path}; give a tokenizer.json") from None
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower type
            raise DataError(f"{path} is not a tokenizer.json: {error}") from error
        return cls(backend, str(path))

    @classmethod
    def from_hub(cls, name: str) -> Self:
        """Download a tokenizer from the Hugging Face hub, or read it from the hub's local cache."""
        try:
            backend = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises no narrower type
            raise DataError(
                f"the tokenizer {name!r} cannot be loaded from the hub: {error} "
                "Check the name and the connection, or give the path of a tokenizer.json."
            ) from error
        return cls(backend, name)

    @cached_property
    def json(self) -> bytes:
        """The content of the tokenizer's ``tokenizer.json``."""
        return self._backend.to_str(pretty=True).encode("utf-8")

    @cached_property
    def sha256(self) -> str:
        """Hash of `json`, in hex."""
        return hashlib.sha256(self.json).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts on all cores; no special token is added.

        Raises:
            DataError: If the tokenizer has no token for a part of a text.
        """
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:  # the library's panics are not subclasses of Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the tokenizer {self._name} cannot encode this text: {error}; give its model an "
                "unknown token that is in its vocabulary, or use another tokenizer"
            ) from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def _without_endless_words(text: str) -> list[str]:
    """Cut overlong words, such as encoded files: training is quadratic in the word length."""
    if _ENDLESS_WORD.search(text) is None:
        return [text]
    return _ENDLESS_WORD.split(text)


def is_tokenizer_path(name: str) -> bool:
    """Whether ``name`` is a local file or folder rather than a name on the hub."""
    return name.endswith(".json") or Path(name).expanduser().exists()


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from the path ``name`` if it is a path, else from the hub."""
    if is_tokenizer_path(name):
        return Tokenizer.from_file(Path(name).expanduser())
    return Tokenizer.from_hub(name)
