"""What momentum adds to a method that keeps nothing, and where it belongs."""

from collections.abc import Mapping
from typing import Any

from sinkgd.lab.experiments.results import StudyResults
from sinkgd.lab.experiments.studies.common import (
    BENCHMARK,
    LR,
    MACHINE,
    MATRIX_LR,
    PAPER_MUON_GRID,
    PAPER_SINKGD_GRID,
    SINKGD_GRID,
    controls,
    muon,
    paper_controls,
)
from sinkgd.lab.experiments.study import Arm, Grid, Setting, Study
from sinkgd.lab.experiments.verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    ended,
    ranked,
    unfinished,
)

NONE = "none"
WAYS: Mapping[str, Mapping[str, Any]] = {
    NONE: {},
    "before-0.9": {"momentum": 0.9},
    "before-0.9-nesterov": {"momentum": 0.9, "nesterov": True},
    "before-0.95-nesterov": {"momentum": 0.95, "nesterov": True},
    "after-0.9": {"momentum": 0.9, "momentum_place": "after"},
}
# Averages of updates are shorter than updates, so that their best rate may be higher.
AFTER_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}
PAPER_AFTER_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}


def arms_with(grid: Grid, after: Grid) -> tuple[Arm, ...]:
    """Return SinkGD as in the paper without momentum and with it, in every way."""
    return tuple(
        Arm(
            name,
            {
                "optimizer.recipe": "sinkgd-paper",
                **{f"optimizer.{key}": x for key, x in way.items()},
            },
            after if "momentum_place" in way else grid,
        )
        for name, way in WAYS.items()
    )


def judge(results: StudyResults) -> Verdict:
    """Say whether any momentum is worth the memory, and which place is the better one."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    none = results.arm(NONE)
    ways = ranked([one for one in results.candidates if one is not none])
    if none is None or not ways:
        best = ranked(results.candidates)[0]
        return Verdict(f"{ended(best)}; there is nothing to compare it with.", (), ())
    best, gain = ways[0], results.difference(ways[0], none)
    if gain.lower:
        headline = f"Momentum helps: {ended(best)}, without it the loss was {none.loss:.3f}."
    elif gain.higher:
        headline = "Momentum harms: every way of it ended higher than none."
    else:
        headline = (
            f"Momentum adds nothing that seeds can tell: {ended(best)}, none {none.loss:.3f}."
        )
    sentences = [compared(one.arm.name, results.difference(one, none), NONE) for one in ways]
    sentences.append("Each keeps one number for every entry of a hidden matrix; none keeps none.")
    sentences += against_controls(results, best if gain.lower else none)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


MOMENTUM = Study(
    name="momentum",
    question="Does momentum help SinkGD, and before or after the normalization?",
    background="The paper has none. Methods that normalize momentum by rows or columns (RMNP, "
    "Mano, Nora) and Sinkhorn on DeepSeek’s tables have it before; averages of normalized "
    "updates are momentum after.",
    settings={
        "machine": Setting(MACHINE, (*arms_with(SINKGD_GRID, AFTER_GRID), *controls(), muon())),
        "paper": Setting(
            BENCHMARK["llama-60m"],
            (
                *arms_with(PAPER_SINKGD_GRID, PAPER_AFTER_GRID),
                *paper_controls(),
                muon(PAPER_MUON_GRID),
            ),
            models=BENCHMARK,
        ),
    },
    judge=judge,
)
