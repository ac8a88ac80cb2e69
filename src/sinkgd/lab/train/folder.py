"""A run's folder: its files, and whether a run may begin or resume there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Literal

from sinkgd.lab.disk import is_special
from sinkgd.lab.results import RESULTS_FILE, Run, RunStart
from sinkgd.lab.train.checkpoint_validation import checkpoints
from sinkgd.lab.train.config import ConfigError, RunConfig, load_config, read_tables
from sinkgd.lab.train.identity import check_unchanged, knows_its_text, with_absolute_paths

_STUDY_FILE = "study.jsonl"  # the STUDY_FILE of `sinkgd.lab.experiments.study_record`

ResumePolicy = Literal["auto", "never", "must"]


class RunFolderError(ValueError):
    """A run must not begin or resume in a folder; the message gives the remedy."""


def check_kind(folder: Path, kind: Literal["run", "comparison", "study"]) -> None:
    """Refuse a folder with results of another kind, which reports would mix with new ones.

    Args:
        folder: The folder; it need not exist.
        kind: What is to be written there: ``run.jsonl``, folders with a ``run.jsonl`` each, or
            ``study.jsonl``.

    Raises:
        RunFolderError: If the folder holds results of another kind.
    """
    held = {
        "run": [folder / RESULTS_FILE],
        "comparison": sorted(folder.glob(f"*/{RESULTS_FILE}")),
        "study": [folder / _STUDY_FILE],
    }
    for other, paths in held.items():
        if other != kind and any(path.exists() for path in paths):
            raise RunFolderError(
                f"{folder} holds a {other} ({paths[0]}), so a {kind} cannot be written there; "
                "give another --out"
            )


class Admission(Enum):
    """What a run has to do in a folder."""

    BEGIN = "begin"
    GO_ON = "go on"
    NOTHING = "nothing: the run is finished"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name: that of the folder, even if the path is given as ``.`` or ``..``."""
        return (self.path if self.path.name not in ("", "..") else self.path.resolve()).name

    @property
    def results(self) -> Path:
        """The append-only JSONL file."""
        return self.path / RESULTS_FILE

    @property
    def config(self) -> Path:
        """The resolved configuration, TOML."""
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def admit(self, config: RunConfig, resume: ResumePolicy) -> Admission:
        """Decide what a run with ``config`` has to do here.

        If the run recorded a hash of its text, the text may be at another path, because
        `sinkgd.lab.train.identity` compares the hashes.

        Args:
            config: The resolved configuration.
            resume: ``"auto"`` resumes a run that has begun, or else begins one; ``"must"`` requires
                a checkpoint, ``"never"`` a folder without a run.

        Raises:
            RunFolderError: If ``resume`` forbids what the folder holds, or the folder holds
                checkpoints without results, a file instead of the folder of checkpoints,
                results that are not a regular file, or a comparison or study.
            ConfigError: If the run there has another configuration; the message gives each changed
                field.
            ResultsError: If the results are damaged.
        """
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise RunFolderError(
                f"{self.checkpoints} is not a folder, but checkpoints are written there; move it "
                "away, or give another --out"
            )
        begun = self.has_begun()
        if not begun:
            check_kind(self.path, "run")
        if not begun and checkpoints(self.checkpoints):
            raise RunFolderError(
                f"{self.checkpoints} holds checkpoints of a run whose results are missing: there "
                f"is no complete line in {self.results}. Put that file back, delete "
                f"{self.checkpoints} to begin again, or give another --out"
            )
        if resume == "must" and not (begun and checkpoints(self.checkpoints)):
            raise RunFolderError(
                f"{self.path} holds no checkpoint to go on from; use --resume auto to begin"
            )
        if not begun:
            return Admission.BEGIN
        if resume == "never":
            raise RunFolderError(
                f"{self.path} already holds a run; give another --out, delete it, or use "
                "--resume auto to go on with it"
            )
        run = Run.read(self.results)
        saved = self.config_of(run.start)
        check_unchanged(saved, config, self.path, text_by_content=knows_its_text(run.start))
        return Admission.NOTHING if run.finished else Admission.GO_ON

    def start(self) -> RunStart:
        """Return the first record of the run here."""
        return Run.read(self.results).start

    def config_of(self, start: RunStart) -> RunConfig:
        """Return the configuration with which the run here began, with absolute paths.

        The record has the paths as they were given, ``config.toml`` the absolute ones.

        Args:
            start: First record of the run.
        """
        saved = read_tables(start.config, RunConfig, self.results)
        try:
            located = load_config(self.config, RunConfig)
        except (ConfigError, OSError):
            located = None
        return with_absolute_paths(saved, located)

    def last_step(self) -> int:
        """Return the last step that the results hold, or 0 if they hold none."""
        steps = Run.read(self.results).steps
        return steps[-1].step if steps else 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training here, until the context or the process ends.

        Folders that are created for the lock are removed with it if they are still empty.

        Raises:
            RunFolderError: If another process holds the lock.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        lock = self.path / ".lock"
        with self._locked(lock):
            try:
                yield
            finally:
                if self.path.is_dir() and [*self.path.iterdir()] == [lock]:
                    lock.unlink()
                    with suppress(OSError):  # another process may have put something there
                        for folder in made:
                            folder.rmdir()

    def _locked(self, lock: Path) -> IO[str]:
        """Open and lock the file ``lock``."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = lock.open("w")
            except FileNotFoundError:
                if self.path.exists():
                    raise
                continue  # another process just removed the folder
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise RunFolderError(
                    f"another process is training in {self.path}; wait for it or stop it, or give "
                    "another --out"
                ) from None
            # Another process may have removed the file before it was locked.
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                return file
            file.close()

    def has_begun(self) -> bool:
        """Whether there is at least one complete line of results.

        Raises:
            RunFolderError: If the results are not a regular file.
        """
        if is_special(self.results):
            raise RunFolderError(
                f"{self.results} is not a regular file; remove it, or give another --out"
            )
        if not self.results.exists():
            return False
        with self.results.open("rb") as file:
            return file.readline().endswith(b"\n")
