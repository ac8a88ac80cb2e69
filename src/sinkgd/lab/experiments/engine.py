"""Run the trainings of a study, a few at a time, in the scheduler's order.

Every result is written as soon as its run ends. A killed study therefore loses at most the work of
its running trainings since their last checkpoints, and the same command continues it.
"""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from sinkgd.lab.experiments.scheduler import ReusableRuns, Scheduler
from sinkgd.lab.experiments.study import (
    StudyError,
    StudyPlan,
    Task,
    added_arms,
    check_same_plan,
)
from sinkgd.lab.experiments.study_record import (
    STUDY_FILE,
    RunResult,
    Session,
    StudyRecord,
    StudyWriter,
    thinned,
)
from sinkgd.lab.experiments.worker import DIVERGED, start_training, wait_until_free, was_stopped
from sinkgd.lab.launch import Interrupt
from sinkgd.lab.results import Run
from sinkgd.lab.train import RunFolder, RunFolderError
from sinkgd.lab.train.config import DataConfig
from sinkgd.lab.train.folder import Admission, check_kind
from sinkgd.lab.train.identity import check_sha256, knows_its_text
from sinkgd.lab.train.machine import describe_environment, select_device
from sinkgd.lab.train.setup import open_dataset
from sinkgd.lab.train.sinks import clock

_MOST_STOPS = 2  # how often a run that others stopped is resumed in a session
RUNS_FOLDER = "runs"  # in the study's folder, with a folder for each run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a session ended, and the results so far."""

    record: StudyRecord
    left: int  # number of runs without a result
    runs: int  # number of all runs
    signal: Signals | None = None


def run_study(
    plan: StudyPlan, folder: Path, *, jobs: int, command: str, say: Say, reuse: bool = True
) -> Outcome:
    """Train the runs of a study that have no result yet.

    Args:
        plan: The plan, after `StudyPlan.check`.
        folder: Folder of the study.
        jobs: Number of trainings at a time.
        command: A command that repeats the study.
        say: Called with a line for every run that starts or is reused, and with other messages.
        reuse: Reuse identical runs from the grids of studies in folders next to ``folder``.

    Raises:
        ConfigError: If the study or a run there has another configuration or was trained on another
            text; the message says what differs.
        RunFolderError: If another process is running the study, the folder of a run is damaged, or
            the study's folder holds a single run or a comparison.
        ResultsError: If the study's file or the results of a run are damaged.
        StudyError: If a run fails for a reason other than divergence, or others stop it repeatedly.
        DataError: If the text is missing, damaged or too small.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(_lock(folder))
        record, writer = _open(plan, folder, command, stack)
        scheduler = Scheduler(plan, record)
        texts: dict[DataConfig, str] = {}
        if scheduler.left:
            texts = _prepare_text(plan, say)
            _check_texts(record, texts)
        environment = _environment(plan)
        reusable = ReusableRuns({})
        if scheduler.left and reuse:
            reusable = ReusableRuns.collect(folder, environment, say)
        engine = _Engine(
            scheduler,
            texts,
            writer,
            reusable,
            folder / RUNS_FOLDER,
            jobs=jobs,
            say=say,
            environment=environment,
            started=started,
        )
        with Interrupt(forward=engine.send) as interrupt:
            try:
                engine.work(interrupt)
            finally:
                engine.close()
    return Outcome(
        record, scheduler.left, scheduler.runs, interrupt.received if scheduler.left else None
    )


@dataclass(frozen=True)
class _Running:
    task: Task
    process: ForkServerProcess
    began: float
    fresh: bool  # whether the run was begun in this session


@dataclass
class _Engine:
    """Runs trainings in parallel and writes their results."""

    scheduler: Scheduler
    texts: Mapping[DataConfig, str]  # hashes of the training texts
    writer: StudyWriter
    reusable: ReusableRuns  # results of other studies, used instead of training
    folder: Path  # folder of the runs
    jobs: int
    say: Say
    environment: dict[str, Any]
    started: float  # when the session began, by `time.perf_counter`
    running: list[_Running] = field(default_factory=list)
    ended: int = 0
    runs_seconds: float = 0.0  # of trainings that ended
    idle_seconds: float = 0.0
    stops: Counter[str] = field(default_factory=Counter)  # by run, without those of the study
    number: int | None = None  # of the session in the record; None until a training begins

    def send(self, number: Signals) -> None:
        """Forward a signal to every training."""
        for one in self.running:
            pid = one.process.pid
            if pid is not None and one.process.is_alive():
                _kill(pid, number)

    def work(self, interrupt: Interrupt) -> None:
        """Keep all jobs busy until every run has ended; after a signal, begin no more runs."""
        while True:
            while len(self.running) < self.jobs and interrupt.received is None:
                task = self.scheduler.next_task()
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
        config = self.scheduler.plan.config(task)
        text = self.texts[config.data]
        reused = self.reusable.find(task, config, text)
        if reused is not None:
            self.say(f"{self._count(task)}, from study {reused.study}")
            self._keep(reused)
            return
        folder = RunFolder(self.folder / task.name)
        if folder.admit(config, "auto") is Admission.NOTHING:  # finished, but not yet recorded
            check_sha256(folder.start(), text, config.data.corpus)
            self._record_result(task, folder, Run.read(folder.results))
            return
        self.say(f"{self._count(task)}{self._eta()}")
        self._begin_session()
        fresh = not folder.results.exists()
        process = start_training(config, folder.path, plain=self.jobs > 1)
        self.running.append(_Running(task, process, time.perf_counter(), fresh))

    def _end(self, one: _Running, *, stopping: bool) -> None:
        self.running.remove(one)
        one.process.join()
        code = one.process.exitcode
        folder = RunFolder(self.folder / one.task.name)
        elapsed = time.perf_counter() - one.began
        if code in (0, DIVERGED):
            self._record_ended(one, folder, elapsed)
            return
        self.runs_seconds += elapsed  # the checkpoint keeps this work
        # A run that is asked to stop while it is being set up may also end with another code: 1 if
        # Ctrl-C arrives twice, from the terminal and from `send`, and 255 if the fork server ended
        # before it could report the code.
        if stopping or was_stopped(code):
            wait_until_free(folder)
            if not stopping:
                self._put_back(one.task)
            return
        raise StudyError(
            f"run {one.task.name} ended with exit code {code}; see its messages above. "
            "Finished runs are kept, and the same command continues the study"
        )

    def _put_back(self, task: Task) -> None:
        """Let a run go on that was stopped, although nobody stopped the study.

        Raises:
            StudyError: If this has happened too often.
        """
        self.stops[task.name] += 1
        if self.stops[task.name] > _MOST_STOPS:
            raise StudyError(
                f"run {task.name} was stopped {self.stops[task.name]} times by a signal that the "
                "study did not send; find out what sends it. Finished runs are kept, and the same "
                "command continues the study"
            )
        self.say(f"run {task.name} was stopped by a signal that the study did not send; resuming")
        self.scheduler.put_back(task)

    def _record_ended(self, one: _Running, folder: RunFolder, elapsed: float) -> None:
        run = Run.read(folder.results)
        self.runs_seconds += run.end.wall_seconds if run.end and one.fresh else elapsed
        self.ended += 1
        # If the process is killed between these two lines, the next session records the run, and
        # does not count it again.
        self._update_session()
        self._record_result(one.task, folder, run)

    def _record_result(self, task: Task, folder: RunFolder, run: Run) -> None:
        self._keep(RunResult(task.arm.name, task.tuning, task.point, thinned(run)))
        shutil.rmtree(folder.checkpoints, ignore_errors=True)

    def _keep(self, result: RunResult) -> None:
        self.writer.add_run(result)
        self.scheduler.finish(result)

    def close(self) -> None:
        """Stop the trainings that still run, wait for them, and write the session's times."""
        self.send(SIGTERM)
        for one in self.running:
            one.process.join()
            self.runs_seconds += time.perf_counter() - one.began
        self.running.clear()
        self._update_session()

    def _begin_session(self) -> None:
        """Write the session's environment before its first training begins."""
        sessions = self.scheduler.record.sessions
        if self.number is None:
            sessions.append(self._session())
            self.number = len(sessions)
            self.writer.begin_session(self.number, sessions[-1])

    def _update_session(self) -> None:
        if self.number is not None:
            session = self.scheduler.record.sessions[self.number - 1] = self._session()
            self.writer.update_session(self.number, session)

    def _session(self) -> Session:
        """Return the record of this process's work so far."""
        now = time.perf_counter()
        return Session(
            jobs=self.jobs,
            runs=self.ended,
            wall_seconds=now - self.started,
            runs_wall_seconds=self.runs_seconds + sum(now - one.began for one in self.running),
            idle_seconds=self.idle_seconds,
            environment=self.environment,
        )

    def _count(self, task: Task) -> str:
        return f"run {self.scheduler.begun} of {self.scheduler.runs}: {task.name}"

    def _eta(self) -> str:
        seconds = self.scheduler.mean_seconds
        if seconds is None:
            return ""
        return f", about {clock(seconds * self.scheduler.left / self.jobs)} left"


def _environment(plan: StudyPlan) -> dict[str, Any]:
    """Describe the environment of the runs."""
    environment = describe_environment(select_device(plan.shared.training.device))
    environment["threads"] = plan.shared.training.threads or environment["threads"]
    return environment


def _kill(pid: int, number: Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # the process has just ended


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock the study against other processes; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is running the study in {folder}; wait for it, stop it, or give "
                "another --out"
            ) from None
        yield


def _open(
    plan: StudyPlan, folder: Path, command: str, stack: ExitStack
) -> tuple[StudyRecord, StudyWriter]:
    """Open the study's file, or begin a new one; add the plan's new arms to the file."""
    begun, now = read_begun(plan, folder), plan.as_json()
    writer = StudyWriter(folder / STUDY_FILE)
    stack.callback(writer.close)
    record = begun or StudyRecord(now, command)
    if begun is None or added_arms(begun.plan, now):
        record.plan, record.command = now, command
        writer.begin(now, command)
    return record, writer


def read_begun(plan: StudyPlan, folder: Path) -> StudyRecord | None:
    """Read the study in ``folder``; None if no study was begun there.

    Raises:
        ConfigError: If the study has another plan; the message names each field that differs.
        ResultsError: If the study's file is damaged.
        RunFolderError: If the folder holds a single run or a comparison.
    """
    check_kind(folder, "study")
    record = _read_record(folder)
    if record is not None:
        check_same_plan(record.plan, plan.as_json(), str(folder))
    return record


def recorded_plan(folder: Path) -> Mapping[str, Any] | None:
    """Return the plan of the study in ``folder``; None if no study was begun there.

    Raises:
        ResultsError: If the study's file is damaged.
    """
    record = _read_record(folder)
    return None if record is None else record.plan


def _read_record(folder: Path) -> StudyRecord | None:
    path = folder / STUDY_FILE
    if not path.exists() or b"\n" not in path.read_bytes():
        return None
    return StudyRecord.read(path)


def _prepare_text(plan: StudyPlan, say: Say) -> dict[DataConfig, str]:
    """Prepare each text once, before any run needs it, and return the hashes of the texts."""
    configs = [plan.config(task) for task in plan.first_tasks()]
    return {
        data: open_dataset(data, say).manifest.content_sha256
        for data in dict.fromkeys(config.data for config in configs)
    }


def _check_texts(record: StudyRecord, texts: Mapping[DataConfig, str]) -> None:
    """Check that the recorded runs were trained on the present text.

    Raises:
        ConfigError: If the text differs; the message gives both hashes.
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
