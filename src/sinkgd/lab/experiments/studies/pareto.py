"""Which methods are on the Pareto front of optimizer state against loss."""

from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    ADAMW_GRID,
    BENCHMARK,
    LR,
    MACHINE,
    MATRIX_LR,
    MUON_GRID,
    ONE_LR_GRID,
    PAPER_ADAMW_GRID,
    PAPER_MUON_GRID,
    PAPER_ONE_LR_GRID,
    PAPER_SWAN_GRID,
    SWAN_GRID,
)
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_charts import state_chart
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, ranked, unfinished
from sinkgd.lab.report.figures import Chart, Identities
from sinkgd.lab.report.quantities import size

L = "optimizer.sinkhorn_iterations"
CONTROLS = ("adamw", "adamw-one-lr")
# Each grid has six points. Those of sinkgd-paper and sinkgd-stateless combine L with a rate.
GRIDS: Mapping[str, Grid] = {
    "sinkgd-paper": {L: (1, 5), LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "sinkgd-stateless": {L: (1, 5), LR: (0.001, 0.002, 0.004)},
    "swan": SWAN_GRID,
    "sinkgd": SWAN_GRID,
    "scale": {LR: (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)},
    "muon": MUON_GRID,
    "apollo-mini": {LR: (0.08,), MATRIX_LR: (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)},
    "adamw": ADAMW_GRID,
    "adamw-one-lr": ONE_LR_GRID,
}
PAPER_GRIDS: Mapping[str, Grid] = {
    "sinkgd-paper": {L: (1, 3, 5), LR: (0.02,), MATRIX_LR: (0.0005, 0.001)},
    "sinkgd-stateless": {L: (1, 5), LR: (0.0005, 0.001, 0.002)},
    "swan": PAPER_SWAN_GRID,
    "sinkgd": PAPER_SWAN_GRID,
    "scale": {LR: (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)},
    "muon": PAPER_MUON_GRID,
    "apollo-mini": {LR: (0.02,), MATRIX_LR: (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)},
    "adamw": PAPER_ADAMW_GRID,
    "adamw-one-lr": PAPER_ONE_LR_GRID,
}


def arms_of(grids: Mapping[str, Grid]) -> tuple[Arm, ...]:
    """Return one arm per method."""
    return tuple(
        Arm(recipe, {"optimizer.recipe": recipe}, grid, control=recipe in CONTROLS)
        for recipe, grid in grids.items()
    )


def state_bytes(one: ArmResults) -> int:
    """Return the bytes of optimizer state, counted at the end of a run."""
    return max(result.run.end.memory.state_bytes for result in one.seeds if result.run.end)


def front(results: StudyResults, arms: Sequence[ArmResults]) -> list[ArmResults]:
    """List the arms on the Pareto front, from the least state to the most.

    An arm is on the front unless an arm that is on it has less state and no higher loss, or a lower
    loss and no more state. Losses count as different only if the difference over seeds is
    significant, so of two arms with level losses, only the one with less state can be on the front.
    Diverged arms are left out.
    """

    def beaten(one: ArmResults, other: ArmResults) -> bool:
        difference = results.difference(other, one)
        return difference.lower or (difference.level and state_bytes(other) < state_bytes(one))

    found: list[ArmResults] = []
    whole = [one for one in ranked(arms) if one.seeds and not one.diverged]
    for one in sorted(whole, key=state_bytes):  # the sort is stable: of equal states, by loss
        if not any(beaten(one, other) for other in found):
            found.append(one)
    return found


def judge(results: StudyResults) -> Verdict:
    """Name the arms on the front, and list the others."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    arms = [*results.candidates, *results.controls]
    best = front(results, arms)
    words = [f"{one.arm.name} ({_size(one)})" for one in best]
    headline = f"On the front of state against loss: {', '.join(words)}."
    if not best:
        headline = "Every arm diverged in a seed."
    off = [one for one in ranked(arms) if one not in best and not one.diverged]
    sentences = [f"{one.arm.name} is off it: {_size(one)}." for one in off]
    paper = results.arm("sinkgd-paper")
    if paper is not None and paper.chosen is not None and MATRIX_LR in paper.chosen:
        point = paper.chosen
        sentences.append(
            f"The best L × α of sinkgd-paper: L = {point.get(L, 5):g}, rate of matrices "
            f"{point[MATRIX_LR]:g}."
        )
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def charts(results: StudyResults, identities: Identities) -> list[Chart]:
    """Draw state against loss for the arms without divergence."""
    arms = [one for one in results.ranked if one.seeds and not one.diverged]
    bytes_by_arm = {one.arm.name: state_bytes(one) for one in arms}
    best = front(results, arms)
    return [state_chart(arms, bytes_by_arm, best, identities)]


def _size(one: ArmResults) -> str:
    return f"{size(state_bytes(one))}, {one.loss:.3f}"


PARETO = Study(
    name="pareto",
    question="Which methods give the lowest loss for the memory that they keep?",
    background="State is counted in bytes after the last step. L and α of sinkgd-paper are tuned "
    "together, with as many points as every other method.",
    settings={
        "machine": Setting(MACHINE, arms_of(GRIDS)),
        "paper": Setting(BENCHMARK["llama-350m"], arms_of(PAPER_GRIDS), models=BENCHMARK),
    },
    judge=judge,
    charts=charts,
)
