"""The model Lens L6, trained by `TemperedSinkGD` at three temperatures (S1 to S3) or by AdamWSPAM.

AdamWSPAM, the arm S0, is the control of the verdict; both AdamWs are controls, too.
`TemperedSinkGD` is called the tempered variant.

Letters:
    τ, n: temperature and iterations of the tempered variant
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import LR, MACHINE, controls, paper_controls
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    cautions,
    compared,
    ended,
    ranked,
    unfinished,
)
from sinkgd.lab.results import Evaluation, Run
from sinkgd.lab.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    SharedConfig,
    TrainingConfig,
)

CONTROL = "S0"
VARIANTS: Mapping[str, tuple[float, int]] = {"S1": (0.1, 5), "S2": (0.05, 10), "S3": (0.2, 3)}
DECAY = 0.1  # weight decay of all four arms; each arm clips at 1, the control inside its own step
CLIP = 1.0

# Each grid has six points. The tempered step is as large as the gradient, so it needs rates like
# those of SGD; at the original rate, 6e-4, weights hardly move.
ADAM_GRID: Grid = {LR: (0.0006, 0.0012, 0.0025, 0.005, 0.01, 0.02)}
TEMPERED_GRID: Grid = {LR: (0.0006, 0.03, 0.1, 0.3, 1.0, 3.0)}
PAPER_ADAM_GRID: Grid = {LR: (0.00015, 0.0003, 0.0006, 0.0012, 0.0025, 0.005)}
PAPER_TEMPERED_GRID: Grid = {LR: (0.0006, 0.006, 0.06, 0.2, 0.6, 2.0)}


def arms(adam: Grid, tempered: Grid) -> tuple[Arm, ...]:
    """Return the control and the three variants, which differ only in the optimizer."""
    control: dict[str, Any] = {"optimizer.recipe": "adamw-spam", "optimizer.weight_decay": DECAY}
    return (
        Arm(CONTROL, control, adam, control=True),
        *(
            Arm(
                name,
                {
                    "optimizer.recipe": "tempered",
                    "optimizer.tau": tau,
                    "optimizer.n_iter": n_iter,
                    "optimizer.weight_decay": DECAY,
                    "optimizer.clip_norm": CLIP,
                },
                tempered,
            )
            for name, (tau, n_iter) in VARIANTS.items()
        ),
    )


def roughness(run: Run) -> float | None:
    """Return the roughness of the training curve, nats.

    The roughness is the root mean square of the second differences of the mean losses between
    evaluations. Only the second half of the run counts, without the steep start. The roughness of a
    straight line is 0.

    Returns:
        The roughness, or None if there are fewer than three losses in the second half.

    Examples:
        >>> second_differences([4.0, 3.0, 2.0]), second_differences([4.0, 3.0, 4.0])
        ([0.0], [2.0])
    """
    losses = [step.loss for step in run.steps]
    found = second_differences(losses[len(losses) // 2 :])
    return math.sqrt(statistics.fmean(x * x for x in found)) if found else None


def second_differences(values: Sequence[float]) -> list[float]:
    """Return x₀ − 2x₁ + x₂ for every three successive values."""
    return [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]


def is_stable(one: ArmResults) -> bool:
    """Whether no seed diverged or ended above the loss that it had after a tenth of the run."""
    return not one.diverged and all(_came_down(result.run.evaluations) for result in one.seeds)


def _came_down(evaluations: Sequence[Evaluation]) -> bool:
    early = evaluations[max(0, len(evaluations) // 10 - 1)]
    return evaluations[-1].val_loss <= early.val_loss


def judge(results: StudyResults) -> Verdict:
    """Check the three conditions that the variant's authors ask for, and compare the variants."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    control = results.arm(CONTROL)
    variants = list(results.candidates)
    if control is None:
        return Verdict(f"{CONTROL} has no result to compare with.", (), tuple(cautions(results)))
    met = {
        "as good as S0": _as_good(results, variants, control),
        "smoother": _smoother(variants, control),
        "stable": all(map(is_stable, variants)),
    }
    held = [name for name, holds in met.items() if holds]
    best = ranked(variants)[0]
    headline = f"{len(held)} of 3 conditions hold ({', '.join(held) or 'none'}): "
    headline += f"{ended(control)}, the best variant {ended(best)}."
    sentences = [compared(v.arm.name, results.difference(v, control), CONTROL) for v in variants]
    sentences += [_rough_words([control, *variants]), _stable_words(variants)]
    sentences.append(_sharpness(results))
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _as_good(results: StudyResults, variants: Sequence[ArmResults], control: ArmResults) -> bool:
    differences = [results.difference(one, control) for one in variants]
    return any(difference.lower or difference.level for difference in differences)


def _mean_roughness(one: ArmResults) -> float | None:
    found = [x for result in one.seeds if (x := roughness(result.run)) is not None]
    return statistics.fmean(found) if found else None


def _smoother(variants: Sequence[ArmResults], control: ArmResults) -> bool:
    own = _mean_roughness(control)
    others = [_mean_roughness(one) for one in variants]
    return own is not None and any(x is not None and x < own for x in others)


def _rough_words(arms: Sequence[ArmResults]) -> str:
    found = [(one.arm.name, _mean_roughness(one)) for one in arms]
    words = ", ".join(f"{name} {x:.4f}" for name, x in found if x is not None)
    return (
        "Roughness, the root-mean-square of second differences of the training loss over the "
        f"second half: {words or 'unknown'}."
    )


def _stable_words(variants: Sequence[ArmResults]) -> str:
    bad = [one.arm.name for one in variants if not is_stable(one)]
    return f"Unstable: {', '.join(bad)}." if bad else "Every variant is stable in every seed."


def _sharpness(results: StudyResults) -> str:
    """State whether the sharper or the softer variant beats the middle one."""
    middle = results.arm("S1")
    if middle is None:
        return "S1 has no result, so sharper and softer cannot be compared with it."
    words = [
        f"{kind} ({name}, τ {VARIANTS[name][0]:g}) {_standing(results, one, middle)}"
        for kind, name in (("sharper", "S2"), ("softer", "S3"))
        if (one := results.arm(name)) is not None
    ]
    return f"Beside S1, {' and '.join(words)}." if words else "Only S1 has a result."


def _standing(results: StudyResults, one: ArmResults, middle: ArmResults) -> str:
    difference = results.difference(one, middle)
    if difference.unknown:
        return "cannot be told apart from it with one seed"
    if difference.level:
        return "makes no difference"
    return "helps" if difference.lower else "harms"


_PAPER = SharedConfig(
    model=ModelConfig(preset="lens-121m"),
    data=DataConfig(corpus="shards/fineweb-edu"),
    training=TrainingConfig(
        steps=10_400,
        batch_size=48,
        micro_batch_size=12,
        sequence_length=1024,
        warmup_fraction=2000 / 10_400,
        precision="bf16-autocast",
    ),
    evaluation=EvaluationConfig(every_steps=200, tokens=2_000_000),
    checkpoint=CheckpointConfig(every_steps=1000, keep=1),
    logging=LoggingConfig(print_every_steps=100),
)

LENS = Study(
    name="lens",
    question="Does the tempered variant train Lens L6 as well as AdamWSPAM, and more smoothly?",
    background="S0 is AdamWSPAM; S1 to S3 are the tempered variant with τ .1, n 5; τ .05, n 10; "
    "τ .2, n 3. Its authors ask for a loss at least as good, smoother curves, and stability. Their "
    "arms also differed in rate, decay and clipping. Here decay, clipping, data and steps are the "
    "same, and all grids have the same number of rates, including their 6e-4.",
    settings={
        "machine": Setting(
            # There are many evaluations on little text, to measure the roughness of the curves.
            replace(
                MACHINE,
                model=ModelConfig(preset="lens-nano"),
                evaluation=EvaluationConfig(every_steps=8, tokens=8192),
            ),
            (*arms(ADAM_GRID, TEMPERED_GRID), *controls()),
        ),
        "paper": Setting(_PAPER, (*arms(PAPER_ADAM_GRID, PAPER_TEMPERED_GRID), *paper_controls())),
    },
    judge=judge,
)
