"""The results of a run: plain records in an append-only JSONL file.

One run is one file. Its first line is a `RunStart`. Then follow a `TrainStep` for every optimizer
step, an `Evaluation` at intervals, with `ModelStatistics` if the model has some, a `RunEnd`
whenever the run finished, stopped or failed, and a `Resume` whenever it was resumed. A killed
process may leave an unfinished last line. Readers skip this line, and the next writer cuts it off.

Units are in names or comments. ``tokens`` and ``seconds`` count training alone, from the run's
first step; evaluation, checkpoints and start-up are only in ``wall_seconds``.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

from sinkgd.lab.disk import is_special, naming_path, parse_json
from sinkgd.lab.recorded_names import NAMING, start_now

RESULTS_FILE = "run.jsonl"  # in the run's folder


class ResultsError(ValueError):
    """An unreadable results file; the message gives the file, and the line of a bad record."""


@dataclass(frozen=True)
class RunStart:
    """Everything that is needed to repeat the run."""

    kind: ClassVar[str] = "start"
    name: str  # unique within a comparison, e.g. "sinkgd-seed0"
    recipe: str  # the registered recipe of the optimizer, e.g. "adamw-one-lr"
    seed: int
    command: str  # a shell command that repeats the run
    config: dict[str, Any]  # the resolved configuration, tables as nested dicts
    environment: dict[str, Any]  # versions, commit, device, threads
    parameters: int  # trainable parameters, tied ones counted once
    tokens_per_step: int  # positions in a global batch, padding included
    # Inputs besides the configuration: the model's sizes, and hashes of the data, of the tokenizer,
    # of the optimizer's groups and of given initial weights; empty in records of older versions.
    inputs: dict[str, Any] = field(default_factory=dict)
    naming: int = NAMING  # version of the recipes' names, see `sinkgd.lab.recorded_names`


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step; ``loss`` is the mean over the global batch, before the update."""

    kind: ClassVar[str] = "step"
    step: int  # 1 for the first
    tokens: int  # consumed up to and including this step
    seconds: float  # of training, up to and including this step
    loss: float  # nats per token
    lr: float  # of the first parameter group
    gradient_norm: float  # global l2 norm, before clipping
    step_seconds: float
    optimizer_seconds: float  # the part of step_seconds for updates, even if inside backward


@dataclass(frozen=True)
class Evaluation:
    """Losses on held-out text, after ``step`` steps."""

    kind: ClassVar[str] = "evaluation"
    step: int
    tokens: int
    seconds: float
    val_loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    eval_tokens: int  # targets scored, padding excluded
    galore_perplexity: float | None = None  # as the C4 benchmark computes it, 0.6 to 3 % too low
    other_val_loss: float | None = None  # on evaluation.other_corpus, nats per token


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of the model's inner workings on held-out text, after ``step`` steps."""

    kind: ClassVar[str] = "statistics"
    step: int
    values: dict[str, float]  # by the model's names, e.g. "attention_entropy/mean" in nats


@dataclass(frozen=True)
class Resume:
    """The run was resumed from the checkpoint after ``step`` steps.

    Records above this one are void if their step is later; so is every `RunEnd`, and every `Resume`
    of the same step. Without a checkpoint, ``step`` is 0 and all records above this one are void,
    except the start record.

    ``changed`` has the differences to the environment in the start record: by name, [then, now]. It
    is empty in records of older versions.
    """

    kind: ClassVar[str] = "resume"
    step: int
    changed: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Memory in bytes. ``peak_bytes`` is the process's peak on a CPU, the allocator's on a GPU."""

    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    peak_bytes: int

    @classmethod
    def largest(cls, measured: Sequence[Self]) -> Self:
        """Return the maximum of one or more measurements, for each part separately."""
        return cls(*map(max, zip(*map(astuple, measured), strict=True)))


@dataclass(frozen=True)
class RunEnd:
    """How the run ended."""

    kind: ClassVar[str] = "end"
    status: str  # "finished", "interrupted" or "failed"
    step: int
    tokens: int
    seconds: float
    wall_seconds: float  # including start-up; earlier processes count up to their last checkpoint
    memory: Memory
    message: str = ""  # the reason, if status is "failed"


# Reports read these tables of a configuration.
_TABLES = ("model", "data", "training", "mesh", "optimizer")

Checked = TypeVar("Checked")
Record = RunStart | TrainStep | Evaluation | ModelStatistics | Resume | RunEnd
_KINDS: dict[str, type[Any]] = {
    record.kind: record
    for record in (RunStart, TrainStep, Evaluation, ModelStatistics, Resume, RunEnd)
}


@dataclass
class Run:
    """All records of a run so far, without those that a resume made void."""

    path: Path
    start: RunStart
    steps: list[TrainStep] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    end: RunEnd | None = None
    statistics: list[ModelStatistics] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return self.end is not None and self.end.status == "finished"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a results file.

        Raises:
            ResultsError: If the file is missing or not UTF-8 text, does not begin with a start
                record, has a second one, or has a line that is not a record.
        """
        records = _read_records(path)
        if not records or not isinstance(records[0], RunStart):
            raise ResultsError(f"{path} does not begin with a start record; is it a results file?")
        run = cls(path, records[0])
        for record in records[1:]:
            run._add(record)
        return run

    def _add(self, record: Record) -> None:
        match record:
            case TrainStep():
                self.steps.append(record)
            case Evaluation():
                self.evaluations.append(record)
            case ModelStatistics():
                self.statistics.append(record)
            case RunEnd():
                self.end = record
            case Resume(step):
                # Without a checkpoint the run starts again. Its records of step 0 are also void.
                last = step if step > 0 else -1
                self.steps = [row for row in self.steps if row.step <= last]
                self.evaluations = [row for row in self.evaluations if row.step <= last]
                self.statistics = [row for row in self.statistics if row.step <= last]
                self.end = None
                self.resumes = [row for row in self.resumes if row.step < step] + [record]
            case RunStart():
                raise ResultsError(f"{self.path} holds two start records; one run is one file")


def _read_records(path: Path) -> list[Record]:
    if is_special(path):
        raise ResultsError(f"{path} is not a plain file, so not a results file; remove it")
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ResultsError(f"no results at {path}; `sinkgd train` writes them") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} is not UTF-8 text, so not a results file: {error}") from error
    complete = text[: text.rfind("\n") + 1]
    return [_parse(line, f"{path}:{i}") for i, line in enumerate(complete.splitlines(), start=1)]


def _parse(line: str, where: str) -> Record:
    try:
        values = parse_json(line)
        record = _KINDS[values.pop("kind")]
        if record is RunEnd:
            values["memory"] = checked(Memory(**values["memory"]))
        if record is Resume:
            _check_changes(values)
        if record is RunStart:
            values = start_now(values)
            _check_tables(values)
        parsed: Record = checked(record(**values))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{where} is not a record of this version of sinkgd: {error!r}"
        ) from error
    return parsed


def checked(record: Checked) -> Checked:
    """Check that a record's fields have the types of its class, and return the record.

    Raises:
        TypeError: If a field has another type; the message gives the first such field.

    Examples:
        >>> checked(Resume("three"))
        Traceback (most recent call last):
            ...
        TypeError: step is 'three' in a record 'Resume'
    """
    kind: Any = type(record)
    for name, kinds in _types_of(kind):
        value = getattr(record, name)
        known = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not known or (float in kinds and _is_beyond_floats(value)):
            raise TypeError(f"{name} is {value!r:.80} in a record {kind.__name__!r}")
    return record


def _is_beyond_floats(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > sys.float_info.max


def _check_changes(values: dict[str, Any]) -> None:
    """Check that the changes in a resume record are pairs."""
    changed = values.get("changed", {})
    if isinstance(changed, dict):  # otherwise `checked` raises
        for name, pair in changed.items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise TypeError(f"changed.{name} is {pair!r:.80} instead of [then, now]")


def _check_tables(values: dict[str, Any]) -> None:
    """Check that the configuration in a start record has dicts where reports expect tables."""
    config = values.get("config")
    if not isinstance(config, dict):
        return  # `checked` raises
    for name in _TABLES:
        if not isinstance(table := config.get(name, {}), dict):
            raise TypeError(f"config.{name} is {table!r:.80} instead of a table")


@cache
def _types_of(kind: type[Any]) -> tuple[tuple[str, tuple[type, ...]], ...]:
    """List a record's fields with the types of their values; an int is a valid float."""
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        members = get_args(hint) if isinstance(hint := hints[one.name], UnionType) else (hint,)
        plain = tuple(get_origin(member) or member for member in members)
        found.append((one.name, (*plain, int) if float in plain else plain))
    return tuple(found)


class Recorder(Protocol):
    """Receives the records of a run, one by one."""

    def write(self, record: Record) -> None:
        """Write one record."""
        ...

    def sync(self) -> None:
        """Force all written records to the disk."""
        ...


class NoRecords:
    """Recorder for ranks other than 0: it writes nothing."""

    def write(self, record: Record) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""


class ResultsWriter:
    """Appends records to a results file and flushes each one as a whole line.

    Args:
        path: The file; it and its folder are made when absent.
        mirrors: Called with every record after it is written, e.g. a TensorBoard sink.
    """

    def __init__(self, path: Path, mirrors: tuple[Callable[[Record], None], ...] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_unfinished_line(path)
        self.path = path
        self._mirrors = mirrors
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record."""
        line = json.dumps({"kind": record.kind, **asdict(record)}, allow_nan=True)
        with naming_path(self.path):
            self._file.write(line + "\n")
            self._file.flush()
        for mirror in self._mirrors:
            mirror(record)

    def sync(self) -> None:
        """Force all written records to the disk; called before every checkpoint."""
        with naming_path(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming_path(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_unfinished_line(path: Path) -> None:
    """Cut off the unfinished last line of a file that a killed process was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
