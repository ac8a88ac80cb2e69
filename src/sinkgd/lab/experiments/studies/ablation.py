"""Which part of the normalization does the work, at equal size of the update."""

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    BENCHMARK,
    MACHINE,
    PAPER_SINKGD_GRID,
    SINKGD_GRID,
    controls,
    paper_controls,
)
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    lowest,
    ranked,
    unfinished,
)

BOTH = "sinkgd-paper"
# Each recipe gives a matrix an update of RMS 1, so the rates of recipes are comparable.
RECIPES = (BOTH, "rows-only", "columns-only", "frobenius", "sign", "swan")


def arms_with(grid: Grid) -> tuple[Arm, ...]:
    """Return one arm per normalization."""
    return tuple(Arm(recipe, {"optimizer.recipe": recipe}, grid) for recipe in RECIPES)


def judge(results: StudyResults) -> Verdict:
    """Name the normalization with the lowest loss, and compare the others with `BOTH`."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    best = ranked(results.candidates)[0]
    headline = lowest(results, best, alone=" beyond the spread of seeds.")
    both = results.arm(BOTH)
    others = [one for one in results.candidates if one is not both]
    sentences = _beside(results, both, others) if both is not None else []
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _beside(results: StudyResults, both: ArmResults, others: list[ArmResults]) -> list[str]:
    """Compare every other normalization with rows and columns together."""
    return [
        compared(one.arm.name, results.difference(one, both), both.arm.name)
        for one in ranked(others)
    ]


ABLATION = Study(
    name="ablation",
    question="Rows, columns, both, Frobenius, sign or whitening: which normalization does the "
    "work?",
    background="Each gives a matrix an update of RMS 1. SCALE and SRON normalize only rows; SWAN "
    "whitens, which costs matrix products.",
    settings={
        "machine": Setting(MACHINE, (*arms_with(SINKGD_GRID), *controls())),
        "paper": Setting(
            BENCHMARK["llama-60m"],
            (*arms_with(PAPER_SINKGD_GRID), *paper_controls()),
            models=BENCHMARK,
        ),
    },
    judge=judge,
)
