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
from sinkgd.lab.experiments.study_charts import whiskers
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, ranked, unfinished
from sinkgd.lab.report.figures import Chart, Figure, Identities, axis, layout
from sinkgd.lab.report.quantities import loss, size

L = "optimizer.sinkhorn_iterations"
CONTROLS = ("adamw", "adamw-one-lr")
_MIB = 1024**2
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
    With one seed in common, the losses themselves decide. Diverged arms are left out.
    """

    def beaten(one: ArmResults, other: ArmResults) -> bool:
        difference = results.difference(other, one)
        if difference.unknown:
            return difference.mean <= 0
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
    return [_state_chart(arms, bytes_by_arm, best, identities)]


def _state_chart(
    arms: Sequence[ArmResults],
    state_bytes: Mapping[str, int],
    front: Sequence[ArmResults],
    identities: Identities,
) -> Chart:
    """Draw the final loss of every arm against its optimizer state, and the Pareto front.

    Args:
        arms: Arms with seeds, none of them diverged.
        state_bytes: Bytes of optimizer state, by arm.
        front: The arms on the front, from the least state to the most.
        identities: Colors and markers of the arms.
    """
    words = [
        f"{one.arm.name} {size(state_bytes[one.arm.name])}, {loss(one.loss or 0)}" for one in arms
    ]
    names = ", ".join(one.arm.name for one in front)
    return Chart(
        key="state-loss",
        title="State against final loss",
        caption="Optimizer state between steps against the validation loss at the end, mean and "
        "range over seeds. Lower and further left is better; the line is the Pareto front.",
        description=f"{'; '.join(words)}. On the front: {names}.",
        figure={
            "data": [
                _front_line(front, state_bytes),
                *(_state_mark(one, state_bytes[one.arm.name], identities) for one in arms),
            ],
            "layout": layout(
                460,
                xaxis=axis("MiB of optimizer state", rangemode="tozero"),
                yaxis=axis("nats per token"),
                hovermode="closest",
            ),
        },
        share=1,
    )


def _front_line(front: Sequence[ArmResults], state_bytes: Mapping[str, int]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [state_bytes[one.arm.name] / _MIB for one in front],
        "y": [one.loss for one in front],
        "line": {"color": "@soft", "width": 1.4, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _state_mark(one: ArmResults, state_bytes: int, identities: Identities) -> Figure:
    look, ends = identities[one.arm.name], list(one.losses.values())
    return {
        "type": "scatter",
        "mode": "markers",
        "name": look.label,
        "x": [state_bytes / _MIB],
        "y": [one.loss],
        "marker": {"color": look.color, "symbol": look.symbol, "size": 12},
        "error_y": whiskers([one.loss], [(min(ends), max(ends))], look),
        "cliponaxis": False,
        "hovertemplate": f"{look.label}<br>{size(state_bytes)}<br>{loss(one.loss or 0)}"
        "<extra></extra>",
    }


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
