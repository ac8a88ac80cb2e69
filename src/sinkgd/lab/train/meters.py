"""Progress for the eyes: a bar in a terminal, plain lines elsewhere.

A meter is a sink of results like any other: it is handed every record after it was written.
"""

import sys
from collections import deque
from statistics import median
from types import TracebackType
from typing import Protocol, Self, TextIO

from sinkgd.lab.results import Evaluation, Record, Resume, TrainStep

_RECENT_STEPS = 20


class Meter(Protocol):
    """Shows records; a context manager, for a bar must be taken down."""

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
    """Return a bar on standard error where that is a terminal, else lines.

    Args:
        name: Of the run.
        steps: Steps of the whole run.
        print_every_steps: Steps between two lines.
    """
    if sys.stderr.isatty():
        return BarMeter(name, steps)
    return LineMeter(name, steps, print_every_steps, sys.stderr)


class Pace:
    """Tokens a second and the seconds that are left, by the median of the last steps.

    A median, for the first step compiles and allocates, and may take as long as fifty others.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._tokens_per_step = 0
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def add(self, record: TrainStep) -> None:
        """Take a step into account."""
        self._tokens_per_step = record.tokens // record.step
        self._recent.append(record.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Return the speed; 0 before the first step."""
        return self._tokens_per_step / self._step_seconds() if self._recent else 0.0

    def seconds_left(self, step: int) -> float:
        """Return the seconds of training after ``step``."""
        return (self.steps - step) * self._step_seconds() if self._recent else 0.0

    def _step_seconds(self) -> float:
        return median(self._recent)

    def text(self, step: int) -> str:
        """Say both after ``step``."""
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
    """A line every few steps and at every evaluation."""

    def __init__(self, name: str, steps: int, every: int, stream: TextIO) -> None:
        self._name, self._every, self._stream = name, every, stream
        self._pace = Pace(steps)

    def __call__(self, record: Record) -> None:
        """Print a line where one is due."""
        match record:
            case TrainStep():
                self._pace.add(record)
                if record.step % self._every == 0 or record.step == self._pace.steps:
                    text = f"loss {record.loss:.3f}  {self._pace.text(record.step)}"
                    self._print(record.step, text)
            case Evaluation():
                nats, bits = f"{record.val_loss:.3f} nats", f"{record.bits_per_byte:.3f} bits/byte"
                self._print(record.step, f"validation {nats}, {bits}")
            case Resume():
                self._print(record.step, "going on")

    def _print(self, step: int, text: str) -> None:
        line = f"{self._name}  step {step:>{len(str(self._pace.steps))}}/{self._pace.steps}  {text}"
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class BarMeter:
    """A bar with the loss, the speed and the time left."""

    def __init__(self, name: str, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._pace = Pace(steps)
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
                self._pace.add(record)
                self._progress.update(
                    self._task,
                    completed=record.step,
                    loss=f"loss {record.loss:.3f}",
                    pace=self._pace.text(record.step),
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
