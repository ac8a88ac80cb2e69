"""The training loop: take steps, record each, and evaluate and save checkpoints at intervals.

The learning rate warms up linearly to its peak and follows a cosine down to a fraction of it.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from signal import Signals

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sinkgd.lab.data import Batch, TokenSplit, evaluation_batches
from sinkgd.lab.launch import Interrupt
from sinkgd.lab.results import Evaluation, Memory, ModelStatistics, Recorder, TrainStep
from sinkgd.lab.train.checkpoint import Saver
from sinkgd.lab.train.config import TrainingConfig
from sinkgd.lab.train.evaluate import Score, evaluate, measure_statistics
from sinkgd.lab.train.machine import synchronize
from sinkgd.lab.train.setup import Job
from sinkgd.lab.train.training_step import take_step


def lr_factor(
    step: int, *, steps: int, warmup_fraction: float = 0.1, final_lr_fraction: float = 0.1
) -> float:
    r"""Return the learning rate of the step that follows ``step`` steps, as a fraction of the peak.

    With w = min(round(``warmup_fraction`` · ``steps``), ``steps`` - 1) and k = ``step`` + 1, the
    fraction of step k is k/w during the warm-up, so that the first step has a rate above 0. After
    the warm-up it is

    .. math::
        f + (1 - f) \frac{1 + \cos \pi t}{2}, \qquad t = \frac{k - w}{steps - w}

    with f = ``final_lr_fraction``, which step number ``steps`` reaches exactly.

    Args:
        step: Steps already taken; 0 before the first.
        steps: Steps of the whole run.
        warmup_fraction: Share of the steps with a rising rate, 0 to 1.
        final_lr_fraction: Rate of the last step as a fraction of the peak, 0 to 1.

    Examples:
        >>> [round(lr_factor(step, steps=10, warmup_fraction=0.2), 3) for step in (0, 1, 5, 9)]
        [0.5, 1.0, 0.55, 0.1]
        >>> [round(lr_factor(step, steps=3, warmup_fraction=0.9), 3) for step in range(3)]
        [0.5, 1.0, 0.1]
    """
    number = step + 1
    warmup = min(round(warmup_fraction * steps), steps - 1)  # the last step ends the cosine
    if number <= warmup:
        return number / warmup
    if number >= steps:
        return final_lr_fraction
    progress = (number - warmup) / (steps - warmup)
    cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
    return final_lr_fraction + (1.0 - final_lr_fraction) * cosine


def schedule(optimizer: Optimizer, training: TrainingConfig, *, step: int = 0) -> LambdaLR:
    """Schedule the learning rate of every group, from the step that follows ``step`` steps.

    Args:
        optimizer: The optimizer, whose groups hold their peak rates as ``initial_lr`` or, at step
            0, as ``lr``.
        training: The settings that give the number of steps and the fractions.
        step: Steps already taken; 0 before the first.

    Returns:
        A scheduler to step after every step of the optimizer. It need not be saved.
    """
    factor = partial(
        lr_factor,
        steps=training.steps,
        warmup_fraction=training.warmup_fraction,
        final_lr_fraction=training.final_lr_fraction,
    )
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def run_loop(job: Job, saver: Saver, results: Recorder, interrupt: Interrupt) -> Signals | None:
    """Train to the last step, or to the end of the step in which any rank is interrupted.

    Records go to ``results`` and checkpoints to ``saver``; a checkpoint follows the last step.

    Returns:
        The signal that stopped the run, the same on every rank, or None. A signal that came during
        the last step of the run is returned, too.
    """
    config, world = job.config, job.mesh.world
    if config.model.weights is not None and job.state.step == 0:
        _evaluate(job, results)  # the model is trained already, so its loss is of interest
    for record in training_steps(job):
        results.write(record)
        last = record.step == config.training.steps
        if last or record.step % config.evaluation.every_steps == 0:
            _evaluate(job, results)
        stop = world.highest(interrupt.received or 0)
        if last or stop or record.step % config.checkpoint.every_steps == 0:
            results.sync()  # first, because a checkpoint must not contain a step that results lack
            job.state.update_totals(job.device)
            job.state.memory = Memory.largest(world.from_each(lambda: job.state.memory))
            saver.save(job.state)
        if stop:
            return Signals(stop)
    return None


def training_steps(job: Job) -> Iterator[TrainStep]:
    """Take the remaining steps, one for each record that is requested."""
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
    """Record the scores and the statistics of the model, after the steps taken so far."""
    state, training = job.state, job.config.training
    state.model.at_step(state.step, training.steps)
    results.write(_evaluation(job))
    # Every rank measures on all of these tokens.
    first = next(held_out_batches(job, job.validation, parts=1))
    values = measure_statistics(
        state.model, first.inputs, precision=training.precision, mesh=job.mesh
    )
    if values:
        results.write(ModelStatistics(state.step, values))


def held_out_batches(job: Job, text: TokenSplit, *, parts: int) -> Iterator[Batch]:
    """Yield the batches of held-out text, with the token ids that the last training step had.

    Args:
        job: The run.
        text: The held-out text.
        parts: Number of parts into which batches are divided. Unless their size is configured, each
            part is a micro-batch.
    """
    training, evaluation = job.config.training, job.config.evaluation
    micro_batch_size = training.micro_batch_size
    rows = training.batch_size if micro_batch_size is None else parts * micro_batch_size
    batches = evaluation_batches(
        text,
        sequence_length=training.sequence_length,
        batch_size=rows if evaluation.batch_size is None else evaluation.batch_size,
        max_tokens=evaluation.tokens,
        packing=job.config.data.packing,
    )
    if (shift := job.shift) is None:
        return batches
    return (shift.of_evaluation(batch, job.state.step) for batch in batches)


def _evaluation(job: Job) -> Evaluation:
    state = job.state
    score = _score(job, job.validation)
    other = job.other_validation
    return Evaluation(
        step=state.step,
        tokens=state.step * job.config.tokens_per_step,
        seconds=state.seconds,
        val_loss=score.nats_per_token,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte(job.tokens_per_byte),
        eval_tokens=score.tokens,
        galore_perplexity=score.galore_perplexity,
        other_val_loss=None if other is None else _score(job, other).nats_per_token,
    )


def _score(job: Job, text: TokenSplit) -> Score:
    training = job.config.training
    return evaluate(
        job.state.model,
        held_out_batches(job, text, parts=job.mesh.parts),
        precision=training.precision,
        mesh=job.mesh,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        chunk_tokens=training.loss_chunk_tokens,
    )
