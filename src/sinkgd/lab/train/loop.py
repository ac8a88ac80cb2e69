"""The loop, top to bottom: tokens become batches, batches steps, steps records."""

import time
from collections.abc import Iterator
from signal import Signals

from sinkgd.lab.data import Batch, evaluation_batches
from sinkgd.lab.results import Evaluation, Memory, ModelStatistics, Recorder, TrainStep
from sinkgd.lab.train.device import synchronize
from sinkgd.lab.train.evaluate import evaluate, measure_statistics
from sinkgd.lab.train.interrupt import Interrupt
from sinkgd.lab.train.saver import Saver
from sinkgd.lab.train.schedule import schedule
from sinkgd.lab.train.setup import Job
from sinkgd.lab.train.step import take_step


def run_loop(job: Job, saver: Saver, results: Recorder, interrupt: Interrupt) -> Signals | None:
    """Train to the last step, or to the end of the step in which any rank is interrupted.

    Records go to ``results``, checkpoints to ``saver``; the last thing done is always a checkpoint.

    Returns:
        The signal that stopped the run on every rank, or None.
    """
    config, world = job.config, job.mesh.world
    for record in training_steps(job):
        results.write(record)
        stop = world.highest(interrupt.received or 0)
        last = record.step == config.training.steps
        if last or record.step % config.evaluation.every_steps == 0:
            _evaluate(job, results)
        if last or stop or record.step % config.checkpoint.every_steps == 0:
            results.sync()  # first, for a checkpoint must not know of a step that results lack
            job.state.take_stock(job.device)
            job.state.memory = Memory.largest(world.from_each(lambda: job.state.memory))
            saver.save(job.state)
        if stop:
            return Signals(stop)
    return None


def training_steps(job: Job) -> Iterator[TrainStep]:
    """Take the steps that are left, one each time a record is asked for."""
    state, training = job.state, job.config.training
    scheduler = schedule(state.optimizer, training, step=state.step)
    while state.step < training.steps:
        synchronize(job.device)
        started = time.perf_counter()
        lr = state.optimizer.param_groups[0]["lr"]
        state.model.at_step(state.step, training.steps)
        batch = job.batches.at(0 if training.one_batch else state.step)
        if job.shift is not None:
            batch = job.shift.of_training(batch, state.step)
        result = take_step(
            state.model,
            state.optimizer,
            batch,
            job.config,
            job.mesh,
            number=state.step + 1,
            released=job.released,
        )
        scheduler.step()
        step_seconds = time.perf_counter() - started
        state.step += 1
        state.seconds += step_seconds
        yield TrainStep(
            step=state.step,
            tokens=state.step * job.config.tokens_per_step,
            seconds=state.seconds,
            loss=result.loss,
            lr=lr,
            gradient_norm=result.gradient_norm,
            step_seconds=step_seconds,
            optimizer_seconds=result.optimizer_seconds,
        )


def _evaluate(job: Job, results: Recorder) -> None:
    """Score the model as it is after the steps taken, and record what it says of itself."""
    state, training = job.state, job.config.training
    state.model.at_step(state.step, training.steps)
    results.write(_evaluation(job))
    first = next(_held_out(job))
    values = measure_statistics(
        state.model, first.inputs, precision=training.precision, mesh=job.mesh
    )
    if values:
        results.write(ModelStatistics(state.step, values))


def _held_out(job: Job) -> Iterator[Batch]:
    """Yield the batches of held-out text, as they are scored after the steps taken."""
    training, evaluation = job.config.training, job.config.evaluation
    batches = evaluation_batches(
        job.validation,
        sequence_length=training.sequence_length,
        batch_size=evaluation.batch_size or training.micro_batch_size or training.batch_size,
        max_tokens=evaluation.tokens,
        packing=job.config.data.packing,
    )
    if (shift := job.shift) is None:
        return batches
    return (shift.of_evaluation(batch, job.state.step) for batch in batches)


def _evaluation(job: Job) -> Evaluation:
    training, state = job.config.training, job.state
    score = evaluate(
        state.model,
        _held_out(job),
        precision=training.precision,
        mesh=job.mesh,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        chunk_tokens=training.loss_chunk_tokens,
    )
    return Evaluation(
        step=state.step,
        tokens=state.step * job.config.tokens_per_step,
        seconds=state.seconds,
        val_loss=score.nats_per_token,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte(job.tokens_per_byte),
        eval_tokens=score.tokens,
        galore_perplexity=score.galore_perplexity,
    )
