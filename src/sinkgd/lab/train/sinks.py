"""Sinks for records besides the JSONL file: terminal, TensorBoard, Weights & Biases, trackio.

A sink is called with every record after the record was written. A meter is a sink that shows
progress: a bar on a terminal, plain lines elsewhere.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, Protocol, Self, TextIO

from sinkgd.lab.options import how_to_install
from sinkgd.lab.results import Evaluation, ModelStatistics, Record, Resume, RunStart, TrainStep
from sinkgd.lab.train.config import ConfigError, SinkName

Sink = Callable[[Record], None]
Opener = Callable[[Path, RunStart, int | None, ExitStack], Sink]


@contextmanager
def open_sinks(
    names: tuple[SinkName, ...], folder: Path, start: RunStart, *, resumed_at: int | None = None
) -> Iterator[list[Sink]]:
    """Open sinks, and close them on leaving.

    Args:
        names: Keys of `SINKS`.
        folder: The run's folder, in which TensorBoard and Weights & Biases also write.
        start: First record of the run, with its name and configuration.
        resumed_at: Steps of the checkpoint from which the run resumes, 0 if it begins again; None
            for a new run. TensorBoard then hides what it got after that checkpoint.

    Raises:
        ConfigError: If a sink's package is not installed.
    """
    with ExitStack() as closing:
        yield [SINKS[name](folder, start, resumed_at, closing) for name in names]


def scalars(record: Record) -> dict[str, float]:
    """Return the figures of a record by name, ``train/…``, ``validation/…`` or ``model/…``.

    Records of a start, a resumption or an end have none.
    """
    if isinstance(record, ModelStatistics):
        return {f"model/{name}": value for name, value in record.values.items()}
    prefix = {TrainStep: "train", Evaluation: "validation"}.get(type(record))
    if prefix is None:
        return {}
    return {
        f"{prefix}/{name}": value
        for name, value in asdict(record).items()
        if name != "step" and value is not None
    }


def _open_tensorboard(
    folder: Path, _start: RunStart, resumed_at: int | None, closing: ExitStack
) -> Sink:
    # The evaluation before the first step is repeated if the run begins again.
    purge_step = resumed_at + 1 if resumed_at else resumed_at
    writer = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(folder / "tensorboard"), purge_step=purge_step
    )
    closing.callback(writer.close)

    def write(record: Record) -> None:
        for name, value in scalars(record).items():
            assert isinstance(record, TrainStep | Evaluation | ModelStatistics)
            writer.add_scalar(name, value, record.step)

    return write


def _open_wandb(folder: Path, start: RunStart, _resumed_at: int | None, closing: ExitStack) -> Sink:
    return _logging_sink(_require("wandb", "wandb"), start, closing, dir=str(folder))


def _open_trackio(
    _folder: Path, start: RunStart, _resumed_at: int | None, closing: ExitStack
) -> Sink:
    return _logging_sink(_require("trackio", "trackio"), start, closing)


def _logging_sink(package: ModuleType, start: RunStart, closing: ExitStack, **options: Any) -> Sink:
    """Log through the interface that W&B and trackio share."""
    package.init(project="sinkgd", name=start.name, config=start.config, **options)
    closing.callback(package.finish)

    def write(record: Record) -> None:
        if figures := scalars(record):
            assert isinstance(record, TrainStep | Evaluation | ModelStatistics)
            package.log(figures, step=record.step)

    return write


def _require(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"logging.sinks asks for {extra}, which is not installed; {how_to_install(extra)}"
        ) from error


SINKS: Mapping[SinkName, Opener] = MappingProxyType(
    {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}
)


_RECENT_STEPS = 20


class Meter(Protocol):
    """Shows records; it is a context manager, because a bar must be stopped at the end."""

    def __call__(self, record: Record) -> None:
        """Show one record."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def make_meter(name: str, *, steps: int, print_every_steps: int) -> Meter:
    """Return a meter with a bar if standard error is a terminal, else a meter with lines.

    Args:
        name: Name of the run.
        steps: Steps of the whole run.
        print_every_steps: Steps between two lines.
    """
    if sys.stderr.isatty():
        return BarMeter(name, steps)
    return LineMeter(name, steps, print_every_steps, sys.stderr)


class StepRate:
    """Tokens per second and the seconds that are left, from the median time of the last 20 steps.

    From the third step on, the median hides the first step, which compiles and allocates, and may
    take as long as fifty others.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._tokens_per_step = 0
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def add(self, record: TrainStep) -> None:
        """Add a step."""
        self._tokens_per_step = record.tokens // record.step
        self._recent.append(record.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Return the speed; 0 before the first step."""
        return self._tokens_per_step / self._step_seconds() if self._recent else 0.0

    def seconds_left(self, step: int) -> float:
        """Return the expected seconds of training after ``step``; 0 before the first step."""
        return (self.steps - step) * self._step_seconds() if self._recent else 0.0

    def _step_seconds(self) -> float:
        return median(self._recent)

    def text(self, step: int) -> str:
        """Return the speed, and the time that is left after ``step``, as text."""
        return f"{self.tokens_per_second:,.0f} tok/s  {clock(self.seconds_left(step))} left"


def clock(seconds: float) -> str:
    """Write seconds as a clock does.

    Examples:
        >>> clock(75), clock(3723)
        ('1:15', '1:02:03')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class LineMeter:
    """A line every few steps, at every evaluation and when a run resumes."""

    def __init__(self, name: str, steps: int, every: int, stream: TextIO) -> None:
        self._name, self._every, self._stream = name, every, stream
        self._rate = StepRate(steps)

    def __call__(self, record: Record) -> None:
        """Print a line if one is due."""
        match record:
            case TrainStep():
                self._rate.add(record)
                if record.step % self._every == 0 or record.step == self._rate.steps:
                    text = f"loss {record.loss:.3f}  {self._rate.text(record.step)}"
                    self._print(record.step, text)
            case Evaluation():
                nats, bits = f"{record.val_loss:.3f} nats", f"{record.bits_per_byte:.3f} bits/byte"
                self._print(record.step, f"validation {nats}, {bits}")
            case Resume():
                self._print(record.step, "going on")

    def _print(self, step: int, text: str) -> None:
        line = f"{self._name}  step {step:>{len(str(self._rate.steps))}}/{self._rate.steps}  {text}"
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class BarMeter:
    """A bar with the losses, the speed and the time left."""

    def __init__(self, name: str, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._rate = StepRate(steps)
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[validation]}", style="cyan"),
            TextColumn("{task.fields[pace]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._progress.add_task(name, total=steps, loss="", validation="", pace="")

    def __call__(self, record: Record) -> None:
        """Move the bar."""
        match record:
            case TrainStep():
                self._rate.add(record)
                self._progress.update(
                    self._task,
                    completed=record.step,
                    loss=f"loss {record.loss:.3f}",
                    pace=self._rate.text(record.step),
                )
            case Evaluation():
                self._progress.update(self._task, validation=f"val {record.val_loss:.3f}")
            case Resume():
                self._progress.update(self._task, completed=record.step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
