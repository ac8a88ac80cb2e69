"""How large the matrices' rate may be beside that of everything else."""

from sinkgd.lab.experiments.results import StudyResults
from sinkgd.lab.experiments.studies.common import BENCHMARK, LR, MACHINE, MATRIX_LR, controls
from sinkgd.lab.experiments.study import Arm, Axis, Grid, Setting, Study
from sinkgd.lab.experiments.verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    lowest,
    ranked,
    unfinished,
)

ALPHAS = (0.01, 0.025, 0.05, 0.1)
PUBLISHED = 0.05  # Scetbon et al. 2025, algorithm 4
RATE = 0.02  # of everything else: the same

# Four points each: as many as there are values of α.
_ADAMW: Grid = {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.003, 0.006)}
_ONE_LR: Grid = {LR: (0.001, 0.002, 0.004, 0.008)}


def arm_with(alpha: float) -> Arm:
    """Return SinkGD with matrices at α times the published rate of everything else."""
    overrides = {"optimizer.recipe": "sinkgd", LR: RATE, MATRIX_LR: alpha * RATE}
    return Arm(f"alpha{alpha:g}", overrides, value=alpha)


def judge(results: StudyResults) -> Verdict:
    """Say which α ended lowest, and where the published one stands."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    best = ranked(results.candidates)[0]
    values = [one.arm.value for one in results.candidates]
    headline = lowest(results, best)
    sentences = []
    published = next((one for one in results.candidates if one.arm.value == PUBLISHED), None)
    if published is not None and published is not best:
        difference = results.difference(published, best)
        sentences.append(compared(published.arm.name, difference, best.arm.name))
    elif published is best:
        sentences.append("That is the published value.")
    warnings = cautions(results)
    if len(values) > 1 and best.arm.value in (values[0], values[-1]):
        warnings.append(
            f"The best α is at the edge of what was tried: {best.arm.value:g}. Try more with "
            "--alpha."
        )
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(warnings))


_ARMS = (*map(arm_with, ALPHAS), *controls(_ADAMW, _ONE_LR))

ALPHA = Study(
    name="alpha",
    question="What α, the matrices’ rate beside that of everything else, is best at lr 0.02?",
    background="Scetbon et al. 2025 take α = 0.05 at lr 0.02. Here α is the only thing that is "
    "searched for SinkGD; each AdamW has as many points of its own.",
    settings={
        "machine": Setting(MACHINE, _ARMS, at=lambda value, _: (arm_with(value),)),
        "paper": Setting(
            BENCHMARK["llama-60m"],
            _ARMS,
            at=lambda value, _: (arm_with(value),),
            models=BENCHMARK,
        ),
    },
    judge=judge,
    axis=Axis("alpha", "α", log=True),
)
