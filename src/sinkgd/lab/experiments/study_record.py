"""`study.jsonl`: all results of a study, in a file small enough to commit.

Its first line is the plan. After it come a line for every run that ended, whether it finished or
diverged, and lines (kind "session") for every session in which a training began. A session is one
process's work on the study. Its first line has its environment, and is written when its first
training begins; further lines have the number of its runs and its times, and are written whenever
a run ends and when the session ends. The last value counts, so a killed session has the times of
its last run that ended. Older versions wrote one line (kind "sitting") at the end of a session in
which a run ended, and none if the session was killed. If arms are added later, the new plan
follows, and replaces the first one. The study's page and verdict are made from this file only.

Runs are thinned. The training curve has one step per evaluation, with the mean loss and the mean
times since the previous evaluation. A model's statistics are reduced to their means over heads and
blocks.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sinkgd.lab.disk import parse_json
from sinkgd.lab.recorded_names import NAMING, command_now, name_now, plan_now, start_now
from sinkgd.lab.report.analysis import final_loss
from sinkgd.lab.results import (
    Evaluation,
    Memory,
    ModelStatistics,
    ResultsError,
    Run,
    RunEnd,
    RunStart,
    TrainStep,
    checked,
    cut_unfinished_line,
)

STUDY_FILE = "study.jsonl"  # in the study's folder


@dataclass(frozen=True)
class RunResult:
    """A run that ended: it finished or diverged."""

    arm: str
    tuning: bool
    point: Mapping[str, float]  # the tuned values; empty if nothing is tuned
    run: Run  # the thinned run
    study: str = ""  # the study that trained the run, if that is another study

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.run.start.name

    @property
    def seed(self) -> int:
        """Seed of the run's weights and order of text."""
        return self.run.start.seed

    @property
    def loss(self) -> float:
        """The final validation loss, nats per token; infinite if the run diverged."""
        return final_loss(self.run)


# The parts of the plan that pages and verdicts read; see `StudyPlan.as_json`.
_PLAN = {
    "study": str,
    "scale": str,
    "seeds": list,
    "tune": bool,
    "tuning_seed": int,
    "shared": dict,
    "arms": dict,
}
_ARM = ("overrides", "tuned", "value", "control")


@dataclass(frozen=True)
class Session:
    """One process's work on a study, with the times from which its overhead is computed."""

    jobs: int  # number of runs that train at a time
    runs: int  # number of runs that ended in the session
    wall_seconds: float
    runs_wall_seconds: float  # sum over the session's trainings, including unfinished ones
    idle_seconds: float  # sum over jobs of the time without work while other jobs ran
    environment: Mapping[str, Any]

    @property
    def overhead(self) -> float | None:
        """Return the time that jobs spend outside of runs, as a fraction of the time of runs.

        None if no run took time.
        """
        if self.runs_wall_seconds <= 0:
            return None
        held = self.jobs * self.wall_seconds - self.idle_seconds
        return held / self.runs_wall_seconds - 1


# The fields of a session that change while it lasts.
_PROGRESS = ("runs", "wall_seconds", "runs_wall_seconds", "idle_seconds")


@dataclass
class StudyRecord:
    """The content of a study's file."""

    plan: dict[str, Any]  # a result of `StudyPlan.as_json`
    command: str  # the command that began the study, or that added arms
    runs: dict[str, RunResult] = field(default_factory=dict)  # keys are names of runs
    sessions: list[Session] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a study's file; an unfinished last line of a killed process is skipped.

        Raises:
            ResultsError: If the file is missing, empty or not UTF-8 text, or has a line that is not
                a record.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ResultsError(
                f"{path} is not UTF-8 text, so not a study's file: {error}"
            ) from error
        except (FileNotFoundError, NotADirectoryError):
            raise ResultsError(f"no study at {path}; `sinkgd experiment` makes one") from None
        whole = text[: text.rfind("\n") + 1].splitlines()
        record: Self | None = None
        for i, line in enumerate(whole, start=1):
            try:
                content = parse_json(line)
                if record is None or content["kind"] == "plan":
                    _check_plan(content["plan"])
                    naming = content.get("naming", 1)
                    record = record or cls({}, "")
                    record.plan = plan_now(content["plan"], naming)
                    record.command = command_now(content["command"], naming)
                elif content["kind"] == "run":
                    result = _run_from_json(content, path)
                    record.runs[result.name] = result
                elif content["kind"] == "session":
                    record._add_session(**without_kind(content))
                else:
                    record.sessions.append(Session(**without_kind(content)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ResultsError(
                    f"{path}:{i} is not a record of this version of sinkgd: {error!r}"
                ) from error
        if record is None:
            raise ResultsError(f"{path} is empty; delete it and run the study again")
        record._add_environment()
        return record

    def _add_session(self, number: int, **values: Any) -> None:
        """Add a session, or replace values of one; ``number`` counts the sessions from 1."""
        if number == len(self.sessions) + 1:
            self.sessions.append(Session(**values))
        elif 1 <= number <= len(self.sessions):
            self.sessions[number - 1] = replace(self.sessions[number - 1], **values)
        else:
            raise ValueError(f"session {number} follows {len(self.sessions)} sessions")

    def _add_environment(self) -> None:
        """Give every run what the environments of all sessions have in common.

        The device is left out if runs shared it, since their speed is then not that of the device.
        """
        if not self.sessions:
            return
        environments = [session.environment for session in self.sessions]
        common = {
            name: value
            for name, value in environments[0].items()
            if all(name in one and one[name] == value for one in environments)
        }
        if any(session.jobs > 1 for session in self.sessions):
            common.pop("device", None)
        for name, result in self.runs.items():
            start = replace(result.run.start, environment=common)
            self.runs[name] = replace(result, run=replace(result.run, start=start))


class StudyWriter:
    """Appends to a study's file; a write ends when its line is complete and on the disk.

    Args:
        path: The file. An unfinished last line of a killed process is cut off.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8")

    def begin(self, plan: Mapping[str, Any], command: str) -> None:
        """Write the plan: the first line, or a line that replaces it if arms are added."""
        self._write({"kind": "plan", "naming": NAMING, "command": command, "plan": plan})

    def add_run(self, result: RunResult) -> None:
        """Write a run that ended."""
        self._write(_run_as_json(result))

    def begin_session(self, number: int, session: Session) -> None:
        """Write all that is known of a session; ``number`` counts the study's sessions from 1."""
        self._write({"kind": "session", "number": number, **asdict(session)})

    def update_session(self, number: int, session: Session) -> None:
        """Write a session's number of runs and times, which replace those of its earlier lines."""
        progress = {name: getattr(session, name) for name in _PROGRESS}
        self._write({"kind": "session", "number": number, **progress})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _check_plan(plan: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError unless a plan has the parts that pages and verdicts read."""
    for key, kind in _PLAN.items():
        if not isinstance(plan[key], kind):
            raise TypeError(f"{key} is {plan[key]!r:.80}")
    read = [arm[key] for arm in plan["arms"].values() for key in _ARM]
    read += [plan["shared"]["model"]["preset"], plan["shared"]["training"]["steps"]]


def _run_as_json(result: RunResult) -> dict[str, Any]:
    """Return a run as JSON, without its environment, which is in the session.

    Steps and evaluations are lists of values without names.
    """
    run = result.run
    start = {key: value for key, value in asdict(run.start).items() if key != "environment"}
    return {
        "kind": "run",
        "arm": result.arm,
        "tuning": result.tuning,
        "point": dict(result.point),
        "start": start,
        "steps": [_rounded(row) for row in run.steps],
        "evaluations": [_rounded(row) for row in run.evaluations],
        **({"statistics": _statistics_as_json(run.statistics)} if run.statistics else {}),
        "end": asdict(run.end) if run.end else None,
        **({"study": result.study} if result.study else {}),
    }


def _statistics_as_json(records: Sequence[ModelStatistics]) -> dict[str, Any]:
    """Return the names of a model's statistics, and for each record a row: step and values."""
    return {
        "names": list(records[0].values),
        "rows": [[one.step, *one.values.values()] for one in records],
    }


def _statistics_from_json(content: Mapping[str, Any]) -> list[ModelStatistics]:
    names = content["names"]
    return [
        ModelStatistics(step, dict(zip(names, values, strict=True)))
        for step, *values in content["rows"]
    ]


def _rounded(record: TrainStep | Evaluation) -> list[float | None]:
    """Return the fields; floats, except losses, are rounded to six significant digits."""
    return [
        value
        if value is None or isinstance(value, int) or name.endswith("loss")
        else float(f"{value:.6g}")
        for name, value in zip(vars(record), astuple(record), strict=True)
    ]


def _run_from_json(content: Mapping[str, Any], path: Path) -> RunResult:
    end = content["end"]
    if end is not None:
        end = checked(RunEnd(**{**end, "memory": checked(Memory(**end["memory"]))}))
    run = Run(
        path,
        checked(RunStart(**start_now(content["start"]), environment={})),
        [checked(TrainStep(*row)) for row in content["steps"]],
        [checked(Evaluation(*row)) for row in content["evaluations"]],
        end,
        _statistics_from_json(content["statistics"]) if "statistics" in content else [],
    )
    study = content.get("study", "")
    arm = name_now(content["arm"], content["start"].get("naming", 1))
    return RunResult(arm, content["tuning"], content["point"], run, study)


def without_kind(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record, except its kind."""
    return {key: value for key, value in content.items() if key != "kind"}


def thinned(run: Run) -> Run:
    """Keep one step per evaluation, with means over the steps since the previous evaluation."""
    steps, rest = [], run.steps
    for evaluation in run.evaluations:
        count = sum(1 for step in rest if step.step <= evaluation.step)
        if count:
            steps.append(_mean_step(rest[:count]))
        rest = rest[count:]
    kept = [ModelStatistics(one.step, _means(one.values)) for one in run.statistics]
    return Run(run.path, run.start, steps, run.evaluations, run.end, kept)


def _means(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items() if name.endswith("/mean")}


def _mean_step(steps: Sequence[TrainStep]) -> TrainStep:
    last = steps[-1]
    return TrainStep(
        step=last.step,
        tokens=last.tokens,
        seconds=last.seconds,
        loss=statistics.fmean(step.loss for step in steps),
        lr=last.lr,
        gradient_norm=statistics.fmean(step.gradient_norm for step in steps),
        step_seconds=statistics.fmean(step.step_seconds for step in steps),
        optimizer_seconds=statistics.fmean(step.optimizer_seconds for step in steps),
    )
