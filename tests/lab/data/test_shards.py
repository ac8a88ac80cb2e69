"""The writer of shards: what goes in comes out, and a folder is whole or absent."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinkgd.lab.data import (
    DataError,
    FolderTakenError,
    Manifest,
    ShardWriter,
    TokenDataset,
    Tokenizer,
    shards,
)

EOS = 0  # of the byte tokenizer
documents = st.lists(st.lists(st.integers(2, 257), min_size=1, max_size=12), min_size=1, max_size=9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(train=documents, shard_tokens=st.integers(1, 40), data=st.data())
def test_any_stretch_reads_as_written_whatever_the_shards(
    tmp_path_factory, write_shards, train, shard_tokens, data
):
    out = tmp_path_factory.mktemp("any") / "shards"
    split = write_shards(train, shard_tokens=shard_tokens, out=out).split("train")
    stream = [token for ids in train for token in [*ids, EOS]]
    start = data.draw(st.integers(0, len(stream) - 1))
    length = data.draw(st.integers(1, len(stream) - start))
    assert split.read(start, length).tolist() == stream[start : start + length]
    assert split.tokens == len(stream)
    ends = np.cumsum([len(ids) + 1 for ids in train])
    assert split.offsets.tolist() == [0, *ends]
    assert split.documents == len(train)


def test_the_manifest_counts_exactly(write_shards, byte_tokenizer):
    dataset = write_shards([[5, 6], [7], [8, 9, 10]], [[3]], shard_tokens=4)
    manifest = dataset.manifest
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert (train.tokens, train.documents, train.text_bytes) == (9, 3, 6)
    assert (validation.tokens, validation.documents, validation.text_bytes) == (2, 1, 1)
    assert train.bytes_per_token == 6 / 9
    assert manifest.shard_files("train") == [f"train-0000{i}.bin" for i in range(3)]
    sizes = {name: (dataset.folder / name).stat().st_size for name in manifest.files}
    assert sizes == {name: entry.size_bytes for name, entry in manifest.files.items()}
    assert manifest.total_bytes == sum(sizes.values())
    assert {path.name for path in dataset.folder.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest.tokenizer_sha256 == byte_tokenizer.sha256
    assert manifest.sources == ("by hand",)
    assert Manifest.read(dataset.folder) == manifest


def test_a_split_that_fills_its_last_shard_has_no_empty_one(write_shards):
    manifest = write_shards([[5, 6, 7], [8, 9, 10]], shard_tokens=4).manifest
    assert manifest.shard_files("train") == ["train-00000.bin", "train-00001.bin"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(write_shards, vocab_size, dtype):
    vocab = {"</s>": 0, "a": vocab_size - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    dataset = write_shards([[vocab_size - 1]], tokenizer=Tokenizer(backend, "wide"))
    read = dataset.split("train").read(0, 2)
    assert read.dtype == dtype
    assert read.tolist() == [vocab_size - 1, 0]


def test_an_interrupt_leaves_nothing(tmp_path, byte_tokenizer):
    def interrupted():
        with ShardWriter(tmp_path / "out", byte_tokenizer, ()) as writer:
            writer.add("train", np.array([5]), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path, byte_tokenizer):
    with ShardWriter(tmp_path / "out", byte_tokenizer, ()) as writer:
        writer.add("train", np.array([5]), 1)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sinkgd.lab.data import ShardWriter, Tokenizer, shards

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

writer = ShardWriter(Path(sys.argv[1]), Tokenizer.train([], 258), (), shard_tokens=100)
if sys.argv[2] != "document":
    owner, name = {"commit": (writer, "_write"), "rename": (writer, "_rename")}[sys.argv[2]]
    setattr(owner, name, kill)
for i in range(100):
    writer.add("train", np.full(50, 7), 50)
    writer.add("validation", np.full(50, 7), 50)
    if i == 50 and sys.argv[2] == "document":
        kill()
writer.commit()
"""


@pytest.mark.parametrize("moment", ["document", "commit", "rename"])
def test_a_killed_writer_leaves_no_folder_that_could_be_taken_for_data(
    tmp_path, write_shards, moment
):
    out = tmp_path / "shards"
    run = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("shards.partial-")
    if moment != "rename":  # by then the folder is whole and only its name is missing
        with pytest.raises(DataError, match=r"no manifest\.json"):
            TokenDataset.open(partial)
    assert write_shards([[5]], out=out).split("train").tokens == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, write_shards, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(DataError, match=r"the disk of .* is full; nothing was left there"):
        write_shards([[5]])
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from sinkgd.lab.data import ShardWriter, Tokenizer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ShardWriter(Path(sys.argv[1]), Tokenizer.train([], 258), ()) as writer:
        for _ in range(100):
            writer.add("train", np.full(10_000, 7), 10_000)
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def test_a_disk_that_refuses_in_the_middle_of_a_shard_leaves_nothing(tmp_path):
    command = [sys.executable, "-W", "error", "-c", LIMITED, str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"OSError {errno.EFBIG}\n"
    assert run.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_never_touched(tmp_path, write_shards):
    out = tmp_path / "shards"
    out.mkdir()
    write_shards([[5]], out=out)  # an empty folder is as good as none
    with pytest.raises(FolderTakenError, match="exists already; remove it or choose another"):
        write_shards([[6]], out=out)
    assert TokenDataset.open(out).split("train").read(0, 1).tolist() == [5]
    (tmp_path / "file").touch()
    with pytest.raises(FolderTakenError, match="file exists already"):
        write_shards([[6]], out=tmp_path / "file")


def test_a_link_to_an_empty_folder_is_followed(tmp_path, write_shards):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    assert write_shards([[5]], out=link).split("train").tokens == 2
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    (tmp_path / "absent").symlink_to(tmp_path / "disk" / "other")
    assert write_shards([[5]], out=tmp_path / "absent").split("train").tokens == 2


def test_a_folder_that_cannot_be_replaced_is_refused_at_the_start(
    tmp_path, byte_tokenizer, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(out)
        for name in (".", out):
            with pytest.raises(FolderTakenError, match=r"is the working folder.*--out .*shards"):
                ShardWriter(shards.Path(name), byte_tokenizer, ())
    monkeypatch.setattr(shards.Path, "is_mount", lambda path: path == out)
    with pytest.raises(FolderTakenError, match=rf"is a mount point.*--out {out}/shards"):
        ShardWriter(out, byte_tokenizer, ())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FolderTakenError, match="loop exists already"):
        ShardWriter(tmp_path / "loop", byte_tokenizer, ())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "loop"}
    assert list(out.iterdir()) == []


def test_a_complete_folder_that_cannot_be_renamed_is_kept_and_named(
    tmp_path, monkeypatch, write_shards
):
    def busy(path, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path), None, str(target))

    monkeypatch.setattr(shards.Path, "rename", busy)
    with pytest.raises(DataError, match=r"cannot rename (.*) to .*shards: .* busy") as refusal:
        write_shards([[5]])
    (kept,) = tmp_path.iterdir()
    assert str(kept) in str(refusal.value)
    assert TokenDataset.open(kept).split("train").tokens == 2


def test_the_first_of_two_writers_wins(tmp_path, byte_tokenizer, write_shards):
    out = tmp_path / "shards"
    with ShardWriter(out, byte_tokenizer, ()) as slow:
        slow.add("train", np.array([6]), 1)
        slow.add("validation", np.array([6]), 1)
        write_shards([[5]], out=out)
        with pytest.raises(FolderTakenError, match="exists already"):
            slow.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert TokenDataset.open(out).split("train").read(0, 1).tolist() == [5]


def test_the_folder_is_as_readable_as_any_other(tmp_path, write_shards):
    (tmp_path / "ordinary").mkdir()
    mode = (tmp_path / "ordinary").stat().st_mode
    assert write_shards([[5]]).folder.stat().st_mode == mode


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([[258]], r"token ids must be in \[0, 258\), got 258 to 258"),
        ([[-1, 5]], r"token ids must be in \[0, 258\), got -1 to 5"),
        ([[]], "at least one token, got none"),
        ([], "the split 'train' has no document"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, write_shards, train, message):
    with pytest.raises(DataError, match=message):
        write_shards(train)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_holds_a_token_at_least(write_shards):
    with pytest.raises(DataError, match="shard_tokens must be at least 1, got 0"):
        write_shards([[5]], shard_tokens=0)
