"""Ranks that die, hang, fail or are told to stop: all end, by name, and go on exactly."""

import errno
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

import torchrun
from sinkgd.lab.results import Run
from sinkgd.lab.train import heartbeat
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.heartbeat import Heartbeat, LostRankError, Rank

STEPS = 24


@pytest.fixture
def quick(monkeypatch):
    """Patience for tests."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.2)


@pytest.fixture
def store():
    store = HashStore()
    for rank in range(2):
        store.set(f"rank {rank}", "0")
    return store


RANKS = [Rank(0, "first-host", 10), Rank(1, "second-host", 11)]


def watches(store):
    return Heartbeat(store, 0, RANKS), Heartbeat(store, 1, RANKS)


@pytest.fixture
def ends(monkeypatch):
    """The exit codes with which processes would have been ended."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about within 5 seconds")


def test_ranks_that_live_are_never_lost_however_slow(quick, store, ends):
    one, other = watches(store)
    with one, other:
        time.sleep(1.0)  # the main thread gives no sign
    assert ends == []


def test_a_silent_rank_ends_a_process_that_waits_for_it(quick, store, ends, capsys):
    first, _ = watches(store)
    words = []
    first.before_exit = words.append
    with first:
        wait_until(lambda: ends)
    assert ends == [1]
    (said,) = words
    assert said.startswith("rank 1 (second-host, process 11) is lost: it gave no sign of life for ")
    assert said in capsys.readouterr().err


def test_a_broken_connection_is_explained_by_the_rank_behind_it(quick, store, ends):
    first, _ = watches(store)
    with first:
        broken = RuntimeError("Connection closed by peer")
        reason = first.explain(broken)
    assert isinstance(reason, LostRankError)
    assert "rank 1 (second-host, process 11) is lost" in str(reason)
    assert "the same command goes on" in str(reason)
    assert first.explain(reason) is reason
    assert ends == []


def test_a_process_that_ended_on_this_host_is_named_at_once(store, monkeypatch):
    gone = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(gone, 0)
    ranks = [
        Rank(0, heartbeat.socket.gethostname(), os.getpid()),
        Rank(1, heartbeat.socket.gethostname(), gone),
    ]
    began = time.monotonic()
    reason = Heartbeat(store, 0, ranks).explain(RuntimeError("Connection closed by peer"))
    assert str(reason).startswith(
        f"rank 1 ({heartbeat.socket.gethostname()}, process {gone}) is lost"
    )
    assert time.monotonic() - began < 2


def test_a_rank_s_own_error_is_its_own_and_told_to_the_others(quick, store, ends):
    first, second = watches(store)
    with first, second:
        error = ValueError("no room")
        assert second.explain(error) is error
        reason = first.explain(RuntimeError("Connection closed by peer"))
    assert str(reason).startswith("rank 1 (second-host, process 11) failed: no room")


def test_a_break_that_no_rank_is_behind_stays_what_it_is(quick, store, ends):
    first, second = watches(store)
    with first, second:
        error = dist.DistError("address in use")
        assert first.explain(error) is error


def test_a_store_that_does_not_answer_ends_the_process(quick, ends):
    class Gone(HashStore):
        def multi_get(self, keys):
            raise dist.DistNetworkError("Broken pipe")

    store = Gone()
    words = []
    first, _ = watches(store)
    first.before_exit = words.append
    with first:
        wait_until(lambda: ends)
    assert "the first node is lost: its store does not answer: Broken pipe" in words[0]


@pytest.mark.parametrize("what", ["results", "standard error"])
def test_a_full_disk_does_not_keep_a_process_that_waits(
    quick, store, ends, capsys, monkeypatch, what
):
    def fill_the_disk(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first, _ = watches(store)
    if what == "results":
        first.before_exit = fill_the_disk
    else:
        full = SimpleNamespace(write=fill_the_disk, writelines=fill_the_disk)
        monkeypatch.setattr(heartbeat.sys, "stderr", full)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with first:
        wait_until(lambda: ends)
    assert ends == [1]
    if what == "results":
        lost, unrecorded = capsys.readouterr().err.splitlines()
        assert lost.startswith("error: rank 1 (second-host, process 11) is lost")
        assert unrecorded.endswith("cannot be recorded: [Errno 28] No space left on device")


def test_a_heartbeat_does_not_replace_a_report_of_a_failure(quick, ends):
    began = threading.Event()

    class Slow(HashStore):
        def set(self, key, value):
            if key == "rank 0" and value.isdigit():
                began.set()
                time.sleep(0.2)
            super().set(key, value)

    store = Slow()
    store.set("rank 1", "0")
    first, _ = watches(store)
    with first:
        assert began.wait(5)
        first.explain(ValueError("no room"))
    assert store.get("rank 0") == b"failed: no room"


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (["MASTER_ADDR", "MASTER_PORT"], "MASTER_ADDR and MASTER_PORT are not set"),
        (["MASTER_PORT"], "MASTER_PORT is not set"),
    ],
)
def test_ranks_without_the_address_of_a_store_are_told_how_to_give_it(monkeypatch, absent, named):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for name in absent:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=f"^{named} in the environment.*start them with torchrun"):
        Heartbeat.connect(0, lambda function: [function()])


@pytest.fixture(scope="module")
def options(shards) -> list[str]:
    return [
        *("--data.corpus", str(shards), "--training.threads", "1"),
        *("--training.steps", str(STEPS), "--checkpoint.every-steps", "6"),
        *("--training.batch-size", "16", "--training.sequence-length", "32"),
        *("--evaluation.every-steps", "10", "--evaluation.tokens", "100"),
    ]


def curve(out):
    result = Run.read(out / "run.jsonl")
    assert result.finished
    return (
        [(s.step, s.tokens, s.loss, s.lr, s.gradient_norm) for s in result.steps],
        [(e.step, e.val_loss, e.eval_tokens) for e in result.evaluations],
    )


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The curve of two ranks that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun.start(out, options)
    assert process.wait(torchrun.PATIENCE) == 0, torchrun.said(out)
    return curve(out)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_after_one_was_killed(options, whole, tmp_path):
    out = tmp_path / "killed"
    process = torchrun.start(out, options, restarts=1)
    torchrun.wait_for_step(process, out, 9)
    os.kill(torchrun.process_of(process, rank=1), signal.SIGKILL)
    assert process.wait(torchrun.PATIENCE) == 0, torchrun.said(out)
    assert "going on from" in torchrun.said(out)
    assert curve(out) == whole
    # The rank that was left has said who was lost.
    assert '"status": "failed"' in (out / "run.jsonl").read_text(encoding="utf-8")
    assert "rank 1 (" in (out / "run.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_all(options, whole, tmp_path):
    out = tmp_path / "stopped"
    process = torchrun.start(out, options)
    torchrun.wait_for_step(process, out, 8)
    os.kill(torchrun.process_of(process, rank=1), signal.SIGTERM)
    assert process.wait(torchrun.PATIENCE) != 0
    result = Run.read(out / "run.jsonl")
    assert result.end.status == "interrupted"
    step = result.end.step
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    assert f"stopped by SIGTERM after step {step} of {STEPS}" in torchrun.said(out)
    assert "Go on with: torchrun --nproc-per-node 2 -m sinkgd.lab train --config" in torchrun.said(
        out
    )
    process = torchrun.start(out, options)
    assert process.wait(torchrun.PATIENCE) == 0, torchrun.said(out)
    assert curve(out) == whole


@pytest.mark.slow
def test_a_disk_that_fills_up_is_a_clear_error_on_every_rank(options, tmp_path):
    def limit_file_size() -> None:
        size = 2**20  # less than a rank's weights, more than the results
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    out = tmp_path / "full"
    process = torchrun.start(out, options, preexec_fn=limit_file_size)
    assert process.wait(torchrun.PATIENCE) != 0
    assert f"error: cannot write checkpoint {out}/checkpoints/step-00000006: " in torchrun.said(out)
    assert not list((out / "checkpoints").iterdir())
    end = Run.read(out / "run.jsonl").end
    assert end.status == "failed"
    assert "make room there" in end.message
