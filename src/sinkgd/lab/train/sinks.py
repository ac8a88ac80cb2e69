"""Other places for results: TensorBoard, Weights & Biases, trackio. The JSONL stays the source."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from sinkgd.lab.results import Evaluation, ModelStatistics, Record, RunStart, TrainStep
from sinkgd.lab.train.config import ConfigError, SinkName

Sink = Callable[[Record], None]
Opener = Callable[[Path, RunStart, ExitStack], Sink]


@contextmanager
def open_sinks(names: tuple[SinkName, ...], folder: Path, start: RunStart) -> Iterator[list[Sink]]:
    """Open sinks, and close them in the end.

    Args:
        names: Keys of `SINKS`.
        folder: The run's folder, where TensorBoard's files go too.
        start: Names the run and holds its configuration.

    Raises:
        ConfigError: If a sink's package is not installed.
    """
    with ExitStack() as closing:
        yield [SINKS[name](folder, start, closing) for name in names]


def scalars(record: Record) -> dict[str, float]:
    """Return a record's figures under ``train/``, ``validation/`` or ``model/``, if it has any."""
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


def _open_tensorboard(folder: Path, _start: RunStart, closing: ExitStack) -> Sink:
    writer = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(folder / "tensorboard")
    )
    closing.callback(writer.close)

    def write(record: Record) -> None:
        for name, value in scalars(record).items():
            assert isinstance(record, TrainStep | Evaluation | ModelStatistics)
            writer.add_scalar(name, value, record.step)

    return write


def _open_wandb(folder: Path, start: RunStart, closing: ExitStack) -> Sink:
    return _logging_sink(_require("wandb", "wandb"), start, closing, dir=str(folder))


def _open_trackio(_folder: Path, start: RunStart, closing: ExitStack) -> Sink:
    return _logging_sink(_require("trackio", "trackio"), start, closing)


def _logging_sink(package: ModuleType, start: RunStart, closing: ExitStack, **options: Any) -> Sink:
    """Log through the interface that W&B has and trackio shares."""
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
            f"logging.sinks asks for {extra}, which is not installed; "
            f"run `pip install 'sinkgd[{extra}]'`"
        ) from error


SINKS: Mapping[SinkName, Opener] = MappingProxyType(
    {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}
)
