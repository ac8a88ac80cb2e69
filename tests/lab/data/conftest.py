"""Folders of shards to test with: the embedded corpus, prepared once, and small ones by hand."""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from sinkgd.lab.data import ShardWriter, TokenDataset, Tokenizer, prepared_corpus


@pytest.fixture(scope="session")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus, tokenized with a vocabulary of 8,192, in a cache of all workers."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache-of-sotu"
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{cache}.lock"):
        patch.setenv("SINKGD_CACHE", str(cache))
        return prepared_corpus("sotu")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte: no merges, 258 tokens, eos 0 and pad 1."""
    return Tokenizer.train([], vocab_size=258)


WriteShards = Callable[..., TokenDataset]


@pytest.fixture
def write_shards(tmp_path: Path, byte_tokenizer: Tokenizer) -> WriteShards:
    """Write documents given as lists of ids, without their eos."""

    def write(
        train: Sequence[Sequence[int]],
        validation: Sequence[Sequence[int]] = ((9,),),
        *,
        shard_tokens: int = 1000,
        tokenizer: Tokenizer = byte_tokenizer,
        out: Path = tmp_path / "shards",
    ) -> TokenDataset:
        with ShardWriter(out, tokenizer, ("by hand",), shard_tokens=shard_tokens) as writer:
            for ids in train:
                writer.add("train", np.array(ids), text_bytes=len(ids))
            for ids in validation:
                writer.add("validation", np.array(ids), text_bytes=len(ids))
            writer.commit()
        return TokenDataset.open(out)

    return write


@pytest.fixture
def c4_folder(tmp_path: Path) -> Path:
    """Two files in C4's layout: three documents to train on, two to validate with."""
    folder = tmp_path / "c4"
    folder.mkdir()
    texts = {
        "c4-train.00000-of-00001.json.gz": ["abcdef", "é", "xyz"],
        "c4-validation.00000-of-00001.json.gz": ["held", "out"],
    }
    for name, rows in texts.items():
        lines = [json.dumps({"text": t, "timestamp": "2019-04-25", "url": "u"}) for t in rows]
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder
