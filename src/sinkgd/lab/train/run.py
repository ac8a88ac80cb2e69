"""A run in its folder: begin or resume, train, and record how it ended."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from sinkgd.lab.launch import Interrupt, StopReport, launch_command
from sinkgd.lab.results import NoRecords, Recorder, ResultsWriter, Resume, RunEnd, RunStart
from sinkgd.lab.train.checkpoint import Saver, load_checkpoint
from sinkgd.lab.train.checkpoint_validation import checkpoints, latest_valid
from sinkgd.lab.train.config import RunConfig, as_tables, command_line, save_config
from sinkgd.lab.train.folder import Admission, ResumePolicy, RunFolder, RunFolderError
from sinkgd.lab.train.identity import (
    environment_changes,
    environment_warnings,
    with_absolute_paths,
)
from sinkgd.lab.train.loop import run_loop
from sinkgd.lab.train.machine import describe_environment, select_device
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.setup import Job, check_finished, set_up
from sinkgd.lab.train.sinks import make_meter, open_sinks
from sinkgd.lab.train.world import join_world


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: after the last step of the run, or earlier by a signal."""

    step: int
    signal: Signals | None = None


def print_to_stderr(message: str) -> None:
    """Print a line to standard error, so that it does not mix with results."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: ResumePolicy = "auto",
    echo: Callable[[str], None] = print_to_stderr,
    name_next_command: bool = True,
) -> Outcome:
    """Train a model in a folder of its own, or resume a run that was stopped there.

    A finished run is left as it is. Under torchrun all processes train together; the first one
    writes results and messages.

    Args:
        config: The run's configuration; it is resolved and saved with the run.
        path: The run's folder, which gives the run its name.
        resume: What to do if a run has begun there, see `RunFolder.admit`.
        echo: Called with each line of messages for the user.
        name_next_command: Whether to name the command that shows the results or resumes the run;
            False for runs that another command started.

    Raises:
        ConfigError: If the configuration cannot run, or the run in ``path`` began with another
            configuration, text, model, recipe or starting weights.
        RunFolderError: If ``resume`` forbids what the folder holds, the folder is in use, or its
            results and checkpoints do not fit together.
        ResultsError: If the results in the folder are damaged.
        DataError: If the text is missing, damaged or too small.
        ModelError: If there is no such preset, or a Hugging Face checkpoint cannot be read.
        CheckpointError: If a checkpoint cannot be written, or checkpoints exist and none can
            be loaded.
        NonFiniteLossError: If the loss or the gradient becomes NaN or infinite.
        LostRankError: If another process died, is suspended or failed.
    """
    started = time.perf_counter()
    config = resolve(config)
    folder = RunFolder(path)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(select_device(config.training.device)))
        echo = echo if world.is_first else _echo_nothing
        try:
            world.from_first(lambda: stack.enter_context(folder.lock()))
            admission = world.from_first(lambda: folder.admit(config, resume))
            if admission is Admission.NOTHING:
                world.from_first(lambda: check_finished(folder, config, echo))
                echo(f"{path} is finished already; nothing to do")
                if name_next_command:
                    echo(_where_results_are(folder))
                return Outcome(config.training.steps)
            begun = world.from_first(folder.start) if admission is Admission.GO_ON else None
            # A checkpoint holds all weights, so the folder of the starting weights may be gone.
            restored = world.from_first(lambda: bool(checkpoints(folder.checkpoints)))
            job = set_up(config, echo, world, begun=begun, restored=restored)
            job.state.clock = started
            if begun is not None:
                for note in environment_warnings(begun, _environment(job)):
                    echo(note)
                _restore(job, folder, echo)
            else:
                for note in _text_notes(job):
                    echo(note)
            outcome = _run(job, folder, admission)
            for words in _how_it_ended(outcome, job, folder, name_next_command):
                echo(words)
            StopReport.made = outcome.signal is not None
            return outcome
        except Exception as error:  # noqa: BLE001  it or its cause is raised again
            raise world.explain(error) from error.__cause__


def _text_notes(job: Job) -> Iterator[str]:
    """Yield notes about text that is shorter than the run asks for."""
    training, asked = job.config.training, job.config.evaluation.tokens
    if not training.one_batch:
        passes = training.steps * training.batch_size / job.batches.rows_per_epoch
        if passes > 1:
            yield f"note: the run reads its text {passes:.1f} times"
    if job.config.data.packing == "concat" and job.validation.tokens < asked:
        yield (
            f"note: the held-out text has {job.validation.tokens:,} tokens, fewer than "
            f"evaluation.tokens ({asked:,}); evaluations score all its rows"
        )


def _echo_nothing(_message: str) -> None:
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
    """Open the results and all sinks, save the configuration, and record the start or resume."""
    start = _describe(job, folder)
    resumed_at = None if admission is Admission.BEGIN else job.state.step
    with ExitStack() as stack:
        sinks = stack.enter_context(
            open_sinks(job.config.logging.sinks, folder.path, start, resumed_at=resumed_at)
        )
        meter = make_meter(
            start.name,
            steps=job.config.training.steps,
            print_every_steps=job.config.logging.print_every_steps,
        )
        stack.enter_context(meter)
        save_config(folder.config, with_absolute_paths(job.config))
        first: RunStart | Resume = start
        if resumed_at is not None:
            changed = environment_changes(folder.start(), start.environment)
            first = Resume(resumed_at, changed)
        results = stack.enter_context(ResultsWriter(folder.results, (*sinks, meter)))
        results.write(first)
        yield results


def _train_and_record_the_end(job: Job, folder: RunFolder, results: Recorder) -> Signals | None:
    """Train; return the signal that stopped the run before its last step, or None."""
    config, world = job.config.checkpoint, job.mesh.world
    if world.heartbeat is not None:
        world.heartbeat.before_exit = lambda reason: results.write(_end(job, "failed", reason))
    # A signal may also come while a failure is recorded: torchrun sends one when a rank is lost.
    with Interrupt() as interrupt:
        try:
            with Saver(
                folder.checkpoints, world, keep=config.keep, asynchronous=config.asynchronous
            ) as saver:
                stopped_by = run_loop(job, saver, results, interrupt)
        except Exception as error:  # noqa: BLE001  it or its cause is raised again
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


def _restore(job: Job, folder: RunFolder, echo: Callable[[str], None]) -> None:
    """Load the latest valid checkpoint; if there is no checkpoint at all, begin again at step 0."""
    world = job.mesh.world
    found = world.from_first(lambda: latest_valid(folder.checkpoints))
    if found is None:
        echo(f"{folder.path} holds no checkpoint yet; beginning again from the first step")
        return
    for damage in found.damages:
        echo(f"warning: {damage}; falling back to the checkpoint before")
    load_checkpoint(found.path, job.state, world)
    recorded = world.from_first(folder.last_step)
    if job.state.step > recorded:
        raise RunFolderError(
            f"{folder.results} ends at step {recorded}, but {found.path} was written after step "
            f"{job.state.step}, so results are lost or are of another run. Put the complete file "
            f"back, delete {folder.checkpoints} to begin again from the first step, or give "
            "another --out"
        )
    echo(f"going on from {found.path}, step {job.state.step} of {job.config.training.steps}")


def _end(job: Job, status: str, message: str = "") -> RunEnd:
    state = job.state
    state.update_totals(job.device)
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
