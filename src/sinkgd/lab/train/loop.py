"""The loop, top to bottom: tokens become batches, batches steps, steps records."""

import time
from collections.abc import Iterator
from signal import Signals

from sinkgd.lab.data import evaluation_batches
from sinkgd.lab.results import Evaluation, Memory, Recorder, TrainStep
from sinkgd.lab.train.device import synchronize
from sinkgd.lab.train.evaluate import evaluate
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
            results.write(_evaluation(job))
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


def _evaluation(job: Job) -> Evaluation:
    training, evaluation, state = job.config.training, job.config.evaluation, job.state
    micro_batch_size = training.micro_batch_size or training.batch_size
    batches = evaluation_batches(
        job.validation,
        sequence_length=training.sequence_length,
        batch_size=evaluation.batch_size or micro_batch_size,
        max_tokens=evaluation.tokens,
        packing=job.config.data.packing,
    )
    if (shift := job.shift) is not None:
        batches = (shift.of_evaluation(batch, state.step) for batch in batches)
    score = evaluate(
        state.model,
        batches,
        precision=training.precision,
        mesh=job.mesh,
        micro_batch_size=micro_batch_size,
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
