"""The order of work: grids first, then seeds at what they chose, a few runs at a time.

Whatever ended is written down at once. So a study that is killed loses at most what its running
trainings did since their last checkpoints, and the same command goes on.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from sinkgd.lab.experiments.agenda import TUNING_FILE, Agenda, Tuning
from sinkgd.lab.experiments.plan import StudyPlan, Task, check_same_plan
from sinkgd.lab.experiments.record import (
    STUDY_FILE,
    RunResult,
    Sitting,
    StudyRecord,
    StudyWriter,
)
from sinkgd.lab.experiments.reuse import Shelf
from sinkgd.lab.experiments.study import StudyError
from sinkgd.lab.experiments.thinning import thinned
from sinkgd.lab.experiments.worker import (
    DIVERGED,
    UNTOLD,
    start_training,
    wait_until_free,
    was_stopped,
)
from sinkgd.lab.launch import Interrupt
from sinkgd.lab.results import Run
from sinkgd.lab.train import RunFolder, RunFolderError
from sinkgd.lab.train.config import DataConfig
from sinkgd.lab.train.folder import Admission
from sinkgd.lab.train.identity import check_sha256, knows_its_text
from sinkgd.lab.train.machine import describe_environment, select_device
from sinkgd.lab.train.setup import open_dataset
from sinkgd.lab.train.sinks import clock

RUNS_FOLDER = "runs"  # in the study's folder, one folder a run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a sitting ended, and what the study has found by then."""

    record: StudyRecord
    left: int  # runs that are still to be made
    signal: Signals | None = None


def run_study(
    plan: StudyPlan, folder: Path, *, jobs: int, command: str, say: Say, reuse: bool = True
) -> Outcome:
    """Run what is left of a study.

    Args:
        plan: Checked.
        folder: Of the study.
        jobs: Trainings at a time, a count.
        command: That repeats the study.
        say: Told of every run, one line each time.
        reuse: Whether runs of the grids of studies beside ``folder`` are taken over where they are
            the same.

    Raises:
        ConfigError: If the study there has another plan; each field that differs is named.
        RunFolderError: If another process is at it.
        StudyError: If a run fails otherwise than by diverging.
        DataError: If the text is missing, damaged or too small.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(_lock(folder))
        record, writer = _open(plan, folder, command, stack)
        tuned = [arm for arm in plan.arms if plan.is_tuned(arm)]
        tuning = stack.enter_context(Tuning(folder / TUNING_FILE, tuned))
        agenda = Agenda(plan, record, tuning)
        texts: dict[DataConfig, str] = {}
        if agenda.left:
            texts = _prepare_text(plan, say)
            _check_texts(record, texts)
        environment = _environment(plan)
        shelf = Shelf({})
        if agenda.left and reuse:
            shelf = Shelf.beside(folder, environment, say)
        engine = _Engine(agenda, texts, writer, shelf, folder / RUNS_FOLDER, jobs, say)
        with Interrupt(forward=engine.send) as interrupt:
            engine.work(interrupt)
        if engine.ended:
            sitting = engine.sitting(environment, time.perf_counter() - started)
            writer.add_sitting(sitting)
            record.sittings.append(sitting)
    return Outcome(record, agenda.left, interrupt.received if agenda.left else None)


@dataclass(frozen=True)
class _Running:
    task: Task
    process: ForkServerProcess
    began: float
    fresh: bool  # no sitting before has begun it


@dataclass
class _Engine:
    """Trainings side by side."""

    agenda: Agenda
    texts: Mapping[DataConfig, str]  # hashes of what runs are trained on
    writer: StudyWriter
    shelf: Shelf  # runs that need no training
    folder: Path  # of the runs
    jobs: int
    say: Say
    running: list[_Running] = field(default_factory=list)
    ended: int = 0
    runs_seconds: float = 0.0
    idle_seconds: float = 0.0

    def send(self, number: Signals) -> None:
        """Hand a signal on to every training."""
        for one in self.running:
            pid = one.process.pid
            if pid is not None and one.process.is_alive():
                _kill(pid, number)

    def work(self, interrupt: Interrupt) -> None:
        """Keep every job busy until nothing is left, or until a signal comes."""
        while True:
            while len(self.running) < self.jobs and interrupt.received is None:
                task = self.agenda.next_task()
                if task is None:
                    break
                self._begin(task)
            if not self.running:
                return
            free, waited = self.jobs - len(self.running), time.perf_counter()
            wait([one.process.sentinel for one in self.running])
            self.idle_seconds += free * (time.perf_counter() - waited)
            for one in [one for one in self.running if not one.process.is_alive()]:
                self._end(one, stopping=interrupt.received is not None)

    def _begin(self, task: Task) -> None:
        config = self.agenda.plan.config(task)
        text = self.texts[config.data]
        lent = self.shelf.find(task, config, text)
        if lent is not None:
            self.say(f"{self._count(task)}, from study {lent.study}")
            self._keep(task, lent)
            return
        folder = RunFolder(self.folder / task.name)
        if folder.admit(config, "auto") is Admission.NOTHING:  # killed before it was written down
            check_sha256(folder.start(), text, config.data.corpus)
            self._write_down(task, folder)
            return
        self.say(f"{self._count(task)}{self._eta()}")
        fresh = not folder.results.exists()
        process = start_training(config, folder.path, plain=self.jobs > 1)
        self.running.append(_Running(task, process, time.perf_counter(), fresh))

    def _end(self, one: _Running, *, stopping: bool) -> None:
        self.running.remove(one)
        one.process.join()
        code = one.process.exitcode
        folder = RunFolder(self.folder / one.task.name)
        if was_stopped(code) or (stopping and code == UNTOLD):
            wait_until_free(folder)
            self.runs_seconds += time.perf_counter() - one.began  # no overhead: it is kept
            return
        if code not in (0, DIVERGED):
            self._stop_others()
            raise StudyError(
                f"run {one.task.name} ended with exit code {code}; what it said stands above. "
                "All that is finished is kept, and the same command goes on"
            )
        result = self._write_down(one.task, folder)
        self.ended += 1
        end = result.run.end
        bare = end.wall_seconds if end and one.fresh else time.perf_counter() - one.began
        self.runs_seconds += bare

    def _write_down(self, task: Task, folder: RunFolder) -> RunResult:
        run = thinned(Run.read(folder.results))
        result = RunResult(task.arm.name, task.tuning, task.point, run)
        self._keep(task, result)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        return result

    def _keep(self, task: Task, result: RunResult) -> None:
        self.writer.add_run(result)
        self.agenda.finish(task, result)

    def _stop_others(self) -> None:
        self.send(SIGTERM)
        for one in self.running:
            one.process.join()

    def _count(self, task: Task) -> str:
        return f"run {self.agenda.begun} of {self.agenda.plan.runs}: {task.name}"

    def _eta(self) -> str:
        seconds = self.agenda.mean_seconds
        if seconds is None:
            return ""
        return f", about {clock(seconds * self.agenda.left / self.jobs)} left"

    def sitting(self, environment: dict[str, Any], wall_seconds: float) -> Sitting:
        """Sum up this process's work."""
        return Sitting(
            jobs=self.jobs,
            runs=self.ended,
            wall_seconds=wall_seconds,
            runs_wall_seconds=self.runs_seconds,
            idle_seconds=self.idle_seconds,
            environment=environment,
        )


def _environment(plan: StudyPlan) -> dict[str, Any]:
    """Describe what the runs run in."""
    environment = describe_environment(select_device(plan.shared.training.device))
    environment["threads"] = plan.shared.training.threads or environment["threads"]
    return environment


def _kill(pid: int, number: Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other processes from this study; a process that dies lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is at the study in {folder}; wait for it or stop it, or give "
                "another --out"
            ) from None
        yield


def _open(
    plan: StudyPlan, folder: Path, command: str, stack: ExitStack
) -> tuple[StudyRecord, StudyWriter]:
    """Read what there is, or begin."""
    record = read_begun(plan, folder)
    writer = StudyWriter(folder / STUDY_FILE)
    stack.callback(writer.close)
    if record is None:
        record = StudyRecord(plan.as_json(), command)
        writer.begin(plan.as_json(), command)
    return record, writer


def read_begun(plan: StudyPlan, folder: Path) -> StudyRecord | None:
    """Read the study that was begun in ``folder``; None where there is none.

    Raises:
        ConfigError: If it has another plan; each field that differs is named.
        ResultsError: If its file is damaged.
    """
    path = folder / STUDY_FILE
    if not path.exists() or b"\n" not in path.read_bytes():
        return None
    record = StudyRecord.read(path)
    check_same_plan(record.plan, plan.as_json(), str(folder))
    return record


def _prepare_text(plan: StudyPlan, say: Say) -> dict[DataConfig, str]:
    """Make the shards before the runs, which would all begin with it; return their hashes."""
    configs = [plan.config(task) for task in plan.first_tasks()]
    return {
        data: open_dataset(data, say).manifest.content_sha256
        for data in dict.fromkeys(config.data for config in configs)
    }


def _check_texts(record: StudyRecord, texts: Mapping[DataConfig, str]) -> None:
    """Refuse to go on with a study whose runs were trained on another text.

    Raises:
        ConfigError: With both hashes.
    """
    known = {_plain(data): (data.corpus, sha256) for data, sha256 in texts.items()}
    for result in record.runs.values():
        start = result.run.start
        if knows_its_text(start) and (found := known.get(_plain(start.config["data"]))) is not None:
            check_sha256(start, found[1], found[0])


def _plain(data: DataConfig | Mapping[str, Any]) -> str:
    table = data if isinstance(data, Mapping) else asdict(data)
    given = {key: value for key, value in table.items() if value is not None}
    return json.dumps(given, sort_keys=True)
