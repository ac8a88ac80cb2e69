"""Run a training in its own process, forked from a server process that has imported torch.

Every run therefore starts with the memory, threads and random state of a fresh `sinkgd train`, and
torch is imported once per study. The server has computed nothing, so it has no torch threads that a
fork would lose.

The server preloads this module. What this module imports takes memory in every run.
"""

import multiprocessing
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from sinkgd import NonFiniteGradientError
from sinkgd.lab.data import DataError
from sinkgd.lab.launch import SIGNALS, exit_code, stop_with_parent
from sinkgd.lab.models import ModelError
from sinkgd.lab.terminal import LastingStream, keep_stderr
from sinkgd.lab.train import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    RunConfig,
    RunFolder,
    RunFolderError,
    train,
)

DIVERGED = 3  # exit code of a run whose loss or gradient was not finite
_STOPPED = set(map(exit_code, SIGNALS))
_PATIENCE_SECONDS = 30.0


def start_training(config: RunConfig, folder: Path, *, plain: bool) -> ForkServerProcess:
    """Start or resume a run.

    Args:
        config: The resolved configuration.
        folder: Folder of the run.
        plain: Whether to print progress as lines even in a terminal, which several runs may share.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_work, args=(config, folder, plain), name=folder.name)
    process.start()
    return process


def was_stopped(code: int | None) -> bool:
    """Whether an exit code means that one of `SIGNALS`, not e.g. SIGKILL, stopped the run."""
    return code in _STOPPED or -(code or 0) in SIGNALS


def _work(config: RunConfig, folder: Path, plain: bool) -> None:
    stop_with_parent()
    keep_stderr()
    if plain:
        sys.stderr = _PlainStream(sys.stderr.fileno())
    sys.exit(_train(config, folder))


def _train(config: RunConfig, folder: Path) -> int:
    try:
        wait_until_free(RunFolder(folder))
        outcome = train(config, folder, name_next_command=False)
    except KeyboardInterrupt:  # before the first step, or at a second Ctrl-C
        return exit_code(signal.SIGINT)
    except (NonFiniteLossError, NonFiniteGradientError) as error:
        sys.stderr.write(f"{folder.name} diverged: {error}\n")
        return DIVERGED
    except (CheckpointError, ConfigError, DataError, ModelError, OSError, RunFolderError) as error:
        sys.stderr.write(f"error: {folder.name}: {error}\n")
        return 1
    return 0 if outcome.signal is None else exit_code(outcome.signal)


def wait_until_free(folder: RunFolder) -> None:
    """Wait up to half a minute for a stopped process that is still saving its checkpoint."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            with folder.lock():
                return
        except RunFolderError:
            time.sleep(0.05)


class _PlainStream(LastingStream):
    """Standard error that claims not to be a terminal, so that output has the form of a log."""

    def isatty(self) -> bool:
        return False
