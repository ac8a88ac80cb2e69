"""A run in its folder: begin or go on, train, and record how it ended."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from sinkgd.lab.launch import launch_command
from sinkgd.lab.results import NoRecords, Recorder, ResultsWriter, Resume, RunEnd, RunStart
from sinkgd.lab.train.checkpoint import Saver, load_checkpoint
from sinkgd.lab.train.config import RunConfig
from sinkgd.lab.train.config_file import as_tables, command_line, save_config
from sinkgd.lab.train.device import select_device
from sinkgd.lab.train.environment import describe_environment
from sinkgd.lab.train.folder import Admission, ResumePolicy, RunFolder, RunFolderError
from sinkgd.lab.train.identity import (
    changes_of_environment,
    notes_on_environment,
    with_absolute_corpus,
)
from sinkgd.lab.train.interrupt import Interrupt
from sinkgd.lab.train.loop import run_loop
from sinkgd.lab.train.meters import make_meter
from sinkgd.lab.train.parallel import join_world
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, check_finished, set_up
from sinkgd.lab.train.sinks import open_sinks
from sinkgd.lab.train.whole import latest_whole


@dataclass(frozen=True)
class Outcome:
    """How a sitting ended: at the last step, or at the signal that stopped it."""

    step: int
    signal: Signals | None = None


def print_to_stderr(message: str) -> None:
    """Print a line for a person to read, out of the way of results."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: ResumePolicy = "auto",
    say: Callable[[str], None] = print_to_stderr,
    name_next_command: bool = True,
) -> Outcome:
    """Train a model in a folder of its own; go on there if a run was stopped.

    Under torchrun all its processes train together; the first one keeps the results and speaks.

    Args:
        config: What to train; it is resolved and saved with the run.
        path: The run's folder. Its name is the run's.
        resume: What to do where a run has begun, see `RunFolder.admit`.
        say: Told what a person should know, one line each time.
        name_next_command: Whether to say which command shows the results, or goes on; not where the
            run is one of several that another command started.

    Raises:
        ConfigError: If the configuration cannot run, or the configuration, text or model of the
            run there differs.
        RunFolderError: If ``resume`` forbids what the folder holds, or another process is at it.
        DataError: If the text is missing, damaged or too small.
        CheckpointError: If a checkpoint cannot be written, or none can be read.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        LostRankError: If another process died, hangs or failed.
    """
    started = time.perf_counter()
    config = resolve(config)
    folder = RunFolder(path)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(select_device(config.training.device)))
        say = say if world.is_first else _say_nothing
        try:
            world.from_first(lambda: stack.enter_context(folder.lock()))
            admission = world.from_first(lambda: folder.admit(config, resume))
            if admission is Admission.NOTHING:
                world.from_first(lambda: check_finished(folder, config, say))
                say(f"{path} is finished already; nothing to do")
                if name_next_command:
                    say(_where_results_are(folder))
                return Outcome(config.training.steps)
            begun = world.from_first(folder.start) if admission is Admission.GO_ON else None
            job = set_up(config, say, world, begun=begun)
            job.state.clock = started
            if begun is not None:
                for note in notes_on_environment(begun, _environment(job)):
                    say(note)
                _restore(job, folder, say)
            else:
                for note in _notes_on_text(job):
                    say(note)
            outcome = _run(job, folder, admission)
            for words in _how_it_ended(outcome, job, folder, name_next_command):
                say(words)
            return outcome
        except Exception as error:  # noqa: BLE001  raised again, or its reason
            raise world.explain(error) from error.__cause__


def _notes_on_text(job: Job) -> Iterator[str]:
    """Say where the text is shorter than what the run asks of it."""
    training, asked = job.config.training, job.config.evaluation.tokens
    if not training.one_batch:
        passes = training.steps * training.batch_size / job.batches.rows_per_epoch
        if passes > 1:
            yield f"note: the run reads its text {passes:.1f} times"
    if job.config.data.packing == "concat" and job.validation.tokens < asked:
        yield (
            f"note: evaluations score all {job.validation.tokens:,} tokens of held-out text, fewer "
            f"than evaluation.tokens ({asked:,})"
        )


def _say_nothing(_message: str) -> None:
    pass


def _run(job: Job, folder: RunFolder, admission: Admission) -> Outcome:
    with ExitStack() as stack:
        results: Recorder = NoRecords()
        if job.mesh.world.is_first:
            results = stack.enter_context(_open_results(job, folder, admission))
        stopped_by = _train_and_record_the_end(job, folder, results)
    return Outcome(job.state.step, stopped_by)


@contextmanager
def _open_results(job: Job, folder: RunFolder, admission: Admission) -> Iterator[ResultsWriter]:
    """Open all that results go to, and write what the run begins with."""
    start = _describe(job, folder)
    with ExitStack() as stack:
        sinks = stack.enter_context(open_sinks(job.config.logging.sinks, folder.path, start))
        meter = make_meter(
            start.name,
            steps=job.config.training.steps,
            print_every_steps=job.config.logging.print_every_steps,
        )
        stack.enter_context(meter)
        save_config(folder.config, with_absolute_corpus(job.config))
        first: RunStart | Resume = start
        if admission is not Admission.BEGIN:
            changed = changes_of_environment(folder.start(), start.environment)
            first = Resume(job.state.step, changed)
        results = stack.enter_context(ResultsWriter(folder.results, (*sinks, meter)))
        results.write(first)
        yield results


def _train_and_record_the_end(job: Job, folder: RunFolder, results: Recorder) -> Signals | None:
    """Return the signal that stopped the run before its last step, or None."""
    config, world = job.config.checkpoint, job.mesh.world
    if world.watch is not None:
        world.watch.last_words = lambda reason: results.write(_end(job, "failed", reason))
    # A signal may come while the end is recorded, too: where a rank is lost torchrun sends it.
    with Interrupt() as interrupt:
        try:
            with Saver(
                folder.checkpoints, world, keep=config.keep, asynchronous=config.asynchronous
            ) as saver:
                stopped_by = run_loop(job, saver, results, interrupt)
        except Exception as error:  # noqa: BLE001  raised again, or its reason
            reason = world.explain(error)
            # The disk may be full; the first error is the one to report.
            with suppress(OSError):
                results.write(_end(job, "failed", str(reason)))
            raise reason from error.__cause__
    finished = job.state.step == job.config.training.steps
    results.write(_end(job, "finished" if finished else "interrupted"))
    return None if finished else stopped_by


def _describe(job: Job, folder: RunFolder) -> RunStart:
    options = ["train", "--out", str(folder.path), *command_line(job.config)]
    return RunStart(
        name=folder.name,
        recipe=job.config.optimizer.recipe,
        seed=job.config.training.seed,
        command=launch_command(options),
        config=as_tables(job.config),
        environment=_environment(job),
        parameters=job.parameters,
        tokens_per_step=job.config.tokens_per_step,
        inputs=dict(job.content),
    )


def _environment(job: Job) -> dict[str, Any]:
    return describe_environment(job.device) | {"mesh": job.mesh.shape}


def _restore(job: Job, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Take over the latest whole checkpoint; without one the run begins again at step 0."""
    world = job.mesh.world
    found = world.from_first(lambda: latest_whole(folder.checkpoints))
    if found is None:
        say(f"{folder.path} holds no checkpoint yet; beginning again from the first step")
        return
    for damage in found.damages:
        say(f"warning: {damage}; falling back to the checkpoint before")
    load_checkpoint(found.path, job.state, world)
    recorded = world.from_first(folder.last_step)
    if job.state.step > recorded:
        raise RunFolderError(
            f"{folder.results} ends at step {recorded}, but {found.path} was written after step "
            f"{job.state.step}, so results are lost or of another run. Put the whole file back, "
            f"delete {folder.checkpoints} to begin again from the first step, or give another --out"
        )
    say(f"going on from {found.path}, step {job.state.step} of {job.config.training.steps}")


def _end(job: Job, status: str, message: str = "") -> RunEnd:
    state = job.state
    state.take_stock(job.device)
    return RunEnd(
        status=status,
        step=state.step,
        tokens=state.step * job.config.tokens_per_step,
        seconds=state.seconds,
        wall_seconds=state.wall_seconds,
        memory=state.memory,
        message=message,
    )


def _how_it_ended(
    outcome: Outcome, job: Job, folder: RunFolder, name_next_command: bool
) -> Iterator[str]:
    if outcome.signal is None:
        if name_next_command:
            yield _where_results_are(folder)
        return
    steps = job.config.training.steps
    stopped = f"stopped by {outcome.signal.name} after step {outcome.step} of {steps}"
    options = ["train", "--config", str(folder.config), "--out", str(folder.path)]
    go_on = f". Go on with: {launch_command(options)}" if name_next_command else ""
    yield f"{stopped}; everything is saved{go_on}"


def _where_results_are(folder: RunFolder) -> str:
    report = shlex.join(["sinkgd", "report", str(folder.path)])
    return f"The results are in {folder.results}. Table and page: {report}"
