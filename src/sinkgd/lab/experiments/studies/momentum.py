"""Whether momentum helps SinkGD, and whether it belongs before or after the normalization."""

from collections.abc import Mapping
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
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
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import (
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
# Averages of updates have smaller norms than updates, so their best rate may be higher.
AFTER_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}
PAPER_AFTER_GRID: Grid = {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)}


def arms_with(grid: Grid, after: Grid) -> tuple[Arm, ...]:
    """Return the paper's SinkGD without momentum and with every kind of momentum."""
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
    """State whether any momentum lowers the loss, and compare each kind with none."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    none = results.arm(NONE)
    ways = ranked([one for one in results.candidates if one is not none])
    if none is None or not ways:
        best = ranked(results.candidates)[0]
        return Verdict(
            f"{ended(best)}; there is nothing to compare it with.", (), tuple(cautions(results))
        )
    best, gain = ways[0], results.difference(ways[0], none)
    if gain.lower:
        headline = f"Momentum helps: {ended(best)}, and {ended(none)}."
    elif gain.higher:
        headline = "Momentum harms: every kind of momentum ended higher than none."
    else:
        headline = f"Momentum does not help measurably: {ended(best)}, and {ended(none)}."
    sentences = [compared(one.arm.name, results.difference(one, none), NONE) for one in ways]
    sentences.append("Every kind of momentum keeps one number for each entry of a hidden matrix.")
    sentences += against_controls(results, best if gain.lower else none)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


MOMENTUM = Study(
    name="momentum",
    question="Does momentum help SinkGD, and before or after the normalization?",
    background="The paper uses no momentum. Methods that normalize momentum by rows or columns "
    "(RMNP, Mano, Nora) and DeepSeek’s Sinkhorn for embeddings have momentum before the "
    "normalization; averages of normalized updates are momentum after it.",
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
