"""The best ratio α of the matrices' learning rate to the rate of all other parameters."""

from collections.abc import Sequence

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR, controls
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    is_at_an_end,
    lowest,
    ranked,
    unfinished,
)

ALPHAS = (0.01, 0.025, 0.05, 0.1, 0.2)
PUBLISHED = 0.05  # Scetbon et al. 2025, algorithm 4
RATE = 0.02  # rate of all other parameters, from the same source
RECIPES = ("sinkgd-paper", "sinkgd")  # names of arms begin with their recipe

# Each grid has five points, as many as there are values of α.
_ADAMW: Grid = {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.003, 0.006, 0.012)}
_ONE_LR: Grid = {LR: (0.001, 0.002, 0.004, 0.008, 0.016)}


def arms_with(alpha: float) -> tuple[Arm, ...]:
    """Return both kinds of SinkGD, with matrices at α times the rate of all other parameters."""
    rates = {LR: RATE, MATRIX_LR: alpha * RATE}
    return tuple(
        Arm(f"{recipe}-alpha{alpha:g}", {"optimizer.recipe": recipe, **rates}, value=alpha)
        for recipe in RECIPES
    )


def judge(results: StudyResults) -> Verdict:
    """Name the α with the lowest loss, and compare the published α with the best of each recipe."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    best = ranked(results.candidates)[0]
    sentences: list[str] = []
    warnings = cautions(results)
    for recipe in RECIPES:
        own = ranked([one for one in results.candidates if one.arm.recipe == recipe])
        if own:
            sentences += _beside_the_published(results, own)
            warnings += _at_an_edge(own)
    sentences += against_controls(results, best)
    return Verdict(lowest(results, best), tuple(sentences), tuple(warnings))


def _beside_the_published(results: StudyResults, own: Sequence[ArmResults]) -> list[str]:
    """Compare the published α of one recipe with its best, the first of ``own``."""
    published = next((one for one in own if one.arm.value == PUBLISHED), None)
    if published is None:
        return []
    if published is own[0]:
        return [f"The lowest loss of {published.arm.recipe} is at the published α."]
    return [compared(published.arm.name, results.difference(published, own[0]), own[0].arm.name)]


def _at_an_edge(own: Sequence[ArmResults]) -> list[str]:
    """Return a caution if the best α, the first of ``own``, is the smallest or largest tried."""
    if not is_at_an_end(own[0], own):
        return []
    name = own[0].arm.name
    return [f"The best α is at the edge of what was tried: {name}. Try more with --alpha."]


_ARMS = (*(arm for alpha in ALPHAS for arm in arms_with(alpha)), *controls(_ADAMW, _ONE_LR))

ALPHA = Study(
    name="alpha",
    question="Which α (the matrices’ rate divided by all other parameters’ rate) is best at "
    "lr 0.02, for the paper’s SinkGD and for SinkGD with deflation?",
    background="Scetbon et al. 2025 use α = 0.05 at lr 0.02. Here α is the only option that is "
    "tuned for the paper’s SinkGD and for SinkGD with deflation. Each AdamW is tuned on a grid "
    "with the same number of points.",
    settings={
        "machine": Setting(MACHINE, _ARMS, at=lambda value, _: arms_with(value)),
        "paper": Setting(
            BENCHMARK["llama-60m"],
            _ARMS,
            at=lambda value, _: arms_with(value),
            models=BENCHMARK,
        ),
    },
    judge=judge,
    axis=Axis("alpha", "α", log=True),
)
