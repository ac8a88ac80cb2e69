"""Checkpoints are exact, whole or absent, and a damaged one is told from a whole one."""

import copy
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sinkgd.lab.models import build_model
from sinkgd.lab.results import Memory
from sinkgd.lab.train import checkpoint_validation
from sinkgd.lab.train.checkpoint import load_checkpoint, save_checkpoint
from sinkgd.lab.train.checkpoint_validation import (
    CHECKSUMS,
    METADATA,
    CheckpointError,
    checkpoints,
    find_damage,
    latest_valid,
)
from sinkgd.lab.train.config import OptimizerConfig
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.lab.train.state import TrainingState

# One of each kind; tests of the recipes have all of them.
KINDS = ("sinkgd", "sinkgd-stateless", "swan", "adamw", "sgd", "muon", "galore", "stable-spam")
TOKENS = torch.arange(32).reshape(2, 16)


def new_state(recipe: str = "adamw", *, vocab_size: int = 64, seed: int = 0) -> TrainingState:
    model = build_model("llama-nano", vocab_size=vocab_size, max_sequence_length=16, seed=seed)
    options = resolve_optimizer(OptimizerConfig(recipe=recipe))
    return TrainingState(model, build_optimizer(model, options))


def train(state: TrainingState, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(state.model(TOKENS).flatten(0, 1), TOKENS.flatten())
        loss.backward()
        state.optimizer.step()
        state.step += 1
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> tuple[Path, TrainingState]:
    """What `saved` copies."""
    folder, state = tmp_path_factory.mktemp("saved"), new_state()
    for _ in range(2):
        train(state, 1)
        save_checkpoint(folder, state.as_dict(), keep=2)
    return folder, state


@pytest.fixture
def saved(two_steps, tmp_path) -> tuple[Path, TrainingState]:
    """Checkpoints of steps 1 and 2, and the state after them."""
    folder, state = two_steps
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True), copy.deepcopy(state)


@pytest.mark.parametrize("recipe", KINDS)
def test_training_goes_on_bit_for_bit(tmp_path, recipe):
    state = new_state(recipe)
    train(state, 3)
    state.seconds, state.wall_seconds, state.memory = 1.5, 2.5, Memory(1, 2, 3, 4)
    path = save_checkpoint(tmp_path, state.as_dict(), keep=1)
    resumed = new_state(recipe, seed=1)
    load_checkpoint(path, resumed)
    assert (resumed.step, resumed.seconds, resumed.wall_seconds) == (3, 1.5, 2.5)
    assert resumed.memory == Memory(1, 2, 3, 4)
    assert train(resumed, 3) == train(state, 3)
    for ours, theirs in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe", KINDS)
def test_saving_changes_nothing(tmp_path, recipe):
    watched, left_alone = new_state(recipe), new_state(recipe)
    losses = []
    for _ in range(3):
        losses += train(watched, 1)
        save_checkpoint(tmp_path, watched.as_dict(), keep=1)
    assert losses == train(left_alone, 3)


def test_the_random_numbers_go_on(tmp_path, saved):
    path, state = saved
    torch.manual_seed(5)
    written = save_checkpoint(path, state.as_dict(), keep=1)
    expected = torch.rand(3)
    torch.rand(7)
    load_checkpoint(written, new_state())
    assert torch.equal(torch.rand(3), expected)


class OnGPU(TrainingState):
    """A state that says that its weights are on a GPU."""

    device = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch) -> list[torch.Tensor]:
    """The states that are set in the random number generator of a GPU."""
    states: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", states.append)
    return states


def on_gpu(state: TrainingState) -> TrainingState:
    return OnGPU(state.model, state.optimizer, step=state.step)


def saved_once(state: TrainingState, folder: Path) -> Path:
    return save_checkpoint(folder, state.as_dict(), keep=1)


@pytest.mark.parametrize("where", [TrainingState, OnGPU])
def test_a_run_that_began_without_a_gpu_goes_on_where_there_is_one(
    tmp_path, gpu, monkeypatch, where
):
    path = saved_once(new_state(), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resumed = new_state(seed=1)
    load_checkpoint(path, where(resumed.model, resumed.optimizer))
    assert gpu == []
    for ours, theirs in zip(
        resumed.model.parameters(), new_state().model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_run_that_began_on_a_gpu_goes_on_without_one(tmp_path, gpu):
    path = saved_once(on_gpu(new_state()), tmp_path)
    load_checkpoint(path, new_state(seed=1))
    assert gpu == []


def test_the_random_numbers_of_a_gpu_go_on(tmp_path, gpu):
    path = saved_once(on_gpu(new_state()), tmp_path)
    load_checkpoint(path, on_gpu(new_state(seed=1)))
    assert [state.tolist() for state in gpu] == [[*range(16)]]


def test_the_last_ones_are_kept(tmp_path):
    state = new_state()
    for _ in range(4):
        train(state, 1)
        save_checkpoint(tmp_path, state.as_dict(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_damaged_later_one_is_deleted_and_never_the_new_one(saved, keep):
    folder, state = saved
    shutil.copytree(folder / "step-00000002", folder / "step-00000009")
    flip_a_byte(folder / "step-00000009" / "__0_0.distcp")
    train(state, 1)
    path = save_checkpoint(folder, state.as_dict(), keep=keep)
    assert checkpoints(folder) == [folder / f"step-0000000{k}" for k in (1, 2, 3)][-keep:]
    found = latest_valid(folder)
    assert found is not None
    assert (found.path, found.damages) == (path, ())


def test_nothing_saved_is_nothing_found(tmp_path):
    assert latest_valid(tmp_path / "absent") is None


def test_the_latest_is_found(saved):
    found = latest_valid(saved[0])
    assert found is not None
    assert (found.path.name, found.damages) == ("step-00000002", ())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", CHECKSUMS])
@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_file_falls_back_and_is_named(saved, name, damage):
    folder, _ = saved
    damage(folder / "step-00000002" / name)
    found = latest_valid(folder)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert len(found.damages) == 1
    assert str(folder / "step-00000002") in found.damages[0]


def test_all_damaged_is_an_error_that_says_how_to_begin_again(saved):
    folder, _ = saved
    for path in folder.iterdir():
        flip_a_byte(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint .* Delete .* begin again"):
        latest_valid(folder)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(saved):
    folder, state = saved
    flip_a_byte(folder / "step-00000002" / "__0_0.distcp")
    save_checkpoint(folder, state.as_dict(), keep=2)
    found = latest_valid(folder)
    assert found is not None
    assert (found.path.name, found.damages) == ("step-00000002", ())


def test_half_written_ones_are_passed_over_and_cleared(saved):
    folder, state = saved
    shutil.copytree(folder / "step-00000002", folder / "step-00000003.partial")
    found = latest_valid(folder)
    assert found is not None
    assert found.path.name == "step-00000002"
    save_checkpoint(folder, state.as_dict(), keep=2)
    assert not (folder / "step-00000003.partial").exists()


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [a_file, a_broken_link, an_empty_folder])
@pytest.mark.parametrize(
    "name",
    [
        "step-00000003",
        "step-00000003.partial",
        "step-00000009",
        "step-1",
        "step-\u0663\u0663\u0663\u0663\u0663\u0663\u0663\u0663",
        "step-",
        "step-x",
    ],
)
def test_what_only_has_the_name_of_a_checkpoint_is_none(saved, name, make):
    folder, state = saved
    make(folder / name)
    found = latest_valid(folder)
    assert found is not None
    assert found.path.name == "step-00000002"
    train(state, 1)
    save_checkpoint(folder, state.as_dict(), keep=2)
    found = latest_valid(folder)
    assert found is not None
    assert found.path.name == "step-00000003"
    if make is a_file:  # it is somebody's, so it is still there
        assert "mine" in [path.read_text() for path in folder.iterdir() if path.is_file()]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000005",
        "step-99999999",
        "step-100000000",
    ]


@pytest.mark.parametrize(
    "moment", ["checkpoint.save", "checkpoint.checksums", "checkpoint.sync_folder"]
)
def test_a_full_disk_leaves_no_half_checkpoint(saved, monkeypatch, moment):
    folder, state = saved

    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"sinkgd.lab.train.{moment}", fill_the_disk)
    train(state, 1)
    with pytest.raises(CheckpointError, match=r"step-00000003: .*No space left .*make room"):
        save_checkpoint(folder, state.as_dict(), keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_disk_fills_up_inside_the_writer(saved, monkeypatch):
    folder, state = saved

    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", fill_the_disk)
    train(state, 1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(folder, state.as_dict(), keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_another_model_is_refused(saved):
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        load_checkpoint(saved[0] / "step-00000002", new_state(vocab_size=80))


def test_another_optimizer_is_refused(saved):
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        load_checkpoint(saved[0] / "step-00000002", new_state("sinkgd"))


def test_checksums_cover_every_file(saved):
    path = saved[0] / "step-00000002"
    listed = json.loads((path / CHECKSUMS).read_text())
    assert set(listed) == {file.name for file in path.iterdir()} - {CHECKSUMS}


@pytest.mark.parametrize("name", [CHECKSUMS, METADATA, "__0_0.distcp"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_plain_file_is_not_read(saved, name, make):
    checkpoint = saved[0] / "step-00000002"
    path = checkpoint / name
    path.unlink()
    make(path)
    assert find_damage(checkpoint) == f"{path} cannot be read: it is not a regular file"


def test_a_file_that_the_disk_cannot_read_falls_back(saved, monkeypatch):
    def fail(_path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_validation, "_checksum", fail)
    damage = find_damage(saved[0] / "step-00000002")
    assert damage is not None
    assert "cannot be read: Input/output error" in damage
