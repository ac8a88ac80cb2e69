"""A checkpoint cannot run code, wherever in it the code lies."""

import builtins
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from sinkgd.lab.models import build_model
from sinkgd.lab.train import checkpoint_validation
from sinkgd.lab.train.checkpoint import _publish, load_checkpoint, save_checkpoint
from sinkgd.lab.train.checkpoint_validation import (
    CheckpointError,
    UnsafeCheckpointError,
    latest_valid,
)
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.lab.train.state import TrainingState


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Ways to create a marker by a call alone; each names another module.
CALLS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
    "builtins.open": lambda marker: Call(builtins.open, str(marker), "w"),
    "subprocess": lambda marker: Call(subprocess.call, ["touch", str(marker)]),
    "shutil": lambda marker: Call(shutil.copy, sys.executable, str(marker)),
    "torch.save": lambda marker: Call(torch.save, 1, str(marker)),
    "nested": lambda marker: {"deep": [(Call(os.system, f"touch {marker}"),)]},
}


def new_state(seed: int = 0) -> TrainingState:
    model = build_model("llama-nano", vocab_size=64, max_sequence_length=16, seed=seed)
    options = resolve_optimizer(OptimizerConfig(recipe="sgd"))
    return TrainingState(model, build_optimizer(model, options))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(folder, new_state().as_dict(), keep=1)


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A whole checkpoint to tamper with."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints" / written.name))


def sign(checkpoint: Path) -> None:
    """Write checksums that fit, as whoever made the folder could."""
    files = [file for file in checkpoint.iterdir() if file.name != checkpoint_validation.CHECKSUMS]
    partial = checkpoint.with_name("again")
    checkpoint.rename(partial)
    sums = checkpoint_validation.checksums(partial / file.name for file in files)
    _publish(partial, checkpoint, sums, keep=1)


def metadata_of(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / checkpoint_validation.METADATA).read_bytes())


def write_metadata(checkpoint: Path, content: object) -> None:
    (checkpoint / checkpoint_validation.METADATA).write_bytes(pickle.dumps(content))
    sign(checkpoint)


def refuse(checkpoint: Path, error: type[Exception] = UnsafeCheckpointError) -> str:
    found = latest_valid(checkpoint.parent)
    assert found is not None
    assert found.path == checkpoint
    with pytest.raises(error) as caught:
        load_checkpoint(checkpoint, new_state())
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["all", "planner_data", "storage_meta"])
def test_code_in_the_metadata_is_refused_by_its_name(checkpoint, tmp_path, call, place):
    marker = tmp_path / "marker"
    code = CALLS[call](marker)
    if place == "all":
        write_metadata(checkpoint, code)
    else:
        metadata = metadata_of(checkpoint)
        setattr(metadata, place, code)
        write_metadata(checkpoint, metadata)
    message = refuse(checkpoint)
    assert not marker.exists()
    assert "which no checkpoint of torch's needs" in message
    assert "give another --out" in message


@pytest.mark.parametrize("call", CALLS)
def test_code_in_a_small_value_is_refused_by_its_name(checkpoint, tmp_path, call):
    marker = tmp_path / "marker"
    metadata = metadata_of(checkpoint)
    index = next(
        index
        for index in metadata.storage_data
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    )
    code = io.BytesIO()
    torch.save(CALLS[call](marker), code)
    (checkpoint / "__0_1.distcp").write_bytes(code.getvalue())
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "__0_1.distcp", 0, len(code.getvalue())
    write_metadata(checkpoint, metadata)
    assert index.fqn in refuse(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deeper/file"])
def test_files_outside_of_the_checkpoint_are_refused(checkpoint, name):
    metadata = metadata_of(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = name
    write_metadata(checkpoint, metadata)
    assert repr(name) in refuse(checkpoint)


def test_metadata_cannot_change_torchs_own_classes(checkpoint):
    # GLOBAL StorageMeta, then BUILD with (None, {"save_id": 7}): the class itself is the target.
    program = b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n(N(S'save_id'\nI7\ndtb."
    (checkpoint / checkpoint_validation.METADATA).write_bytes(program)
    sign(checkpoint)
    assert "it changes" in refuse(checkpoint)
    assert StorageMeta.save_id is None


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", CheckpointError), (b"\x80\x05K", CheckpointError), (b"K\x01.", UnsafeCheckpointError)],
)
def test_metadata_that_is_none_is_one_line(checkpoint, content, error):
    (checkpoint / checkpoint_validation.METADATA).write_bytes(content)
    sign(checkpoint)
    refuse(checkpoint, error)


def test_checksums_must_cover_the_metadata(checkpoint):
    (checkpoint / checkpoint_validation.CHECKSUMS).write_text("{}")
    with pytest.raises(CheckpointError, match=r"it lacks \.metadata"):
        latest_valid(checkpoint.parent)


def test_checksums_name_no_file_outside(checkpoint):
    (checkpoint / checkpoint_validation.CHECKSUMS).write_text(
        '{"../../secret": "", ".metadata": ""}'
    )
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret' lies outside"):
        latest_valid(checkpoint.parent)


def test_an_honest_checkpoint_is_loaded(checkpoint):
    sign(checkpoint)
    state = new_state(seed=1)
    load_checkpoint(checkpoint, state)
    for ours, theirs in zip(state.model.parameters(), new_state().model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
