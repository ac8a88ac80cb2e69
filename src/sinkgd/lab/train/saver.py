"""When checkpoints are written: at once, or beside the training that goes on."""

from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from torch import Tensor
from torch.utils._pytree import tree_map_only

from sinkgd.lab.train.checkpoint import Content, save_checkpoint
from sinkgd.lab.train.parallel import World
from sinkgd.lab.train.state import TrainingState


class Saver:
    """Writes the checkpoints of a run; every call is collective.

    Args:
        folder: Of the checkpoints.
        world: The ranks that write.
        keep: How many checkpoints there may be.
        asynchronous: Whether to write a copy while training goes on. Leaving waits for it.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        self._folder, self._keep = folder, keep
        self._asynchronous = asynchronous
        # The thread's messages must not mix with those of training.
        self._world = world.another() if asynchronous else world
        self._running: Future[Path] | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, or begin to, after the one before is written.

        Raises:
            CheckpointError: If this one, or the one before, cannot be written.
        """
        self._wait()
        if self._asynchronous:
            self._running = self._begin(_copy(state.as_dict()))
        else:
            save_checkpoint(self._folder, state.as_dict(), keep=self._keep, world=self._world)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what is being written, unless something went wrong: a rank may be lost."""
        if error is None:
            self._wait()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _begin(self, content: Content) -> "Future[Path]":
        future: Future[Path] = Future()

        def write() -> None:
            try:
                path = save_checkpoint(self._folder, content, keep=self._keep, world=self._world)
            except BaseException as error:  # noqa: BLE001  whoever waits raises it
                future.set_exception(error)
            else:
                future.set_result(path)

        Thread(target=write, daemon=True).start()
        return future


def _copy(content: Content) -> Content:
    """Copy tensors to the memory of the host; the rest of the state is a copy already."""
    copied: Content = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), content)
    return copied
