"""Which method suits embeddings and the output head, which SinkGD leaves to Adam."""

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    BENCHMARK,
    LR,
    MACHINE,
    MATRIX_LR,
    controls,
    paper_controls,
)
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    lowest,
    ranked,
    unfinished,
)

ADAM = "adamw-tables"
RATE = "optimizer.tables_lr"
# Each grid has six rates. Adam and SAGE move an entry by at most about lr. The others move entries
# by lr in the root mean square.
GRIDS: dict[str, Grid] = {
    "adamw": {RATE: (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)},
    "sinkgd": {RATE: (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)},
    "sinkgd-table": {RATE: (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)},
    "sage": {RATE: (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)},
}
KEPT = {"adamw": 2, "sinkgd": 0, "sinkgd-table": 1, "sage": 1}  # stored numbers per entry


def arms_with(lr: float, matrix_lr: float) -> tuple[Arm, ...]:
    """Return one arm per algorithm for embedding and head, all with SinkGD on hidden matrices.

    Args:
        lr: Learning rate of vectors, which AdamW updates in all arms.
        matrix_lr: Learning rate of hidden matrices, which SinkGD updates in all arms.
    """
    return tuple(
        Arm(
            f"{algorithm}-tables",
            {
                "optimizer.recipe": "sinkgd-paper",
                "optimizer.tables": algorithm,
                LR: lr,
                MATRIX_LR: matrix_lr,
            },
            grid,
        )
        for algorithm, grid in GRIDS.items()
    )


def judge(results: StudyResults) -> Verdict:
    """Name the best algorithm, and compare the others with Adam."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    order = ranked(results.candidates)
    best, adam = order[0], results.arm(ADAM)
    headline = lowest(results, best)
    sentences = []
    if adam is not None:
        others = [one for one in order if one is not adam]
        sentences += [compared(one.arm.name, results.difference(one, adam), ADAM) for one in others]
    kept = ", ".join(f"{name} {count}" for name, count in KEPT.items())
    sentences.append(f"Numbers kept for every entry of a table: {kept}.")
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


TABLES = Study(
    name="tables",
    question="Which algorithm should train embeddings and the output head?",
    background="SinkGD’s authors leave them to Adam. DeepSeek reportedly uses a variant of "
    "Sinkhorn for them. SAGE’s authors find that the paper’s SinkGD fails for them, and propose "
    "another method.",
    settings={
        "machine": Setting(MACHINE, (*arms_with(0.08, 0.002), *controls())),
        "paper": Setting(
            BENCHMARK["llama-60m"],
            (*arms_with(0.02, 0.001), *paper_controls()),
            models=BENCHMARK,
        ),
    },
    judge=judge,
)
