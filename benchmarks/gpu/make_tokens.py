"""Make the text of `first_contact.py`: uint16 tokens of training and validation files.

python benchmarks/gpu/make_tokens.py --train A.json.gz --validation B.json.gz --out tokens.npz

Each line of a file is a JSON object with a ``text``, as in C4. A byte-level BPE is learned from the
training text.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # after every text


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file, gzipped or not."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    for line in content.splitlines():
        yield json.loads(line)["text"]


def learn(path: Path, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path), trainer)
    return tokenizer


def encode(path: Path, tokenizer: Tokenizer, most: int) -> np.ndarray:
    """Return up to ``most`` tokens of a file."""
    end, parts, count = tokenizer.token_to_id(END), [], 0
    for text in texts(path):
        ids = [*tokenizer.encode(text).ids, end]
        parts.append(np.array(ids, dtype=np.uint16))
        count += len(ids)
        if count >= most:
            break
    return np.concatenate(parts)[:most]


def main() -> None:
    """Write the tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--most", type=int, default=16_000_000, help="training tokens")
    args = parser.parse_args()
    tokenizer = learn(args.train, args.vocab_size)
    found = {
        "train": encode(args.train, tokenizer, args.most),
        "validation": encode(args.validation, tokenizer, args.most // 16),
    }
    np.savez_compressed(args.out, train=found["train"], validation=found["validation"])


if __name__ == "__main__":
    main()
