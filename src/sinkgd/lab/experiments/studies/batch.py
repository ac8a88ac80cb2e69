"""Whether SinkGD holds against AdamW as the batch grows, each with rates tuned for it."""

from collections.abc import Mapping

from sinkgd.lab.experiments.results import ArmResults, StudyResults
from sinkgd.lab.experiments.studies.common import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import NOTHING, Arm, Axis, Grid, Setting, Study
from sinkgd.lab.experiments.verdict import Verdict, cautions, compared, unfinished
from sinkgd.lab.train.config import SharedConfig

CANDIDATE = "sinkgd"
SIZES = (4, 16, 64)  # sequences
PAPER_SIZES = (128, 512, 2048)

# Four points each, for every size of the batch.
GRIDS: dict[str, Grid] = {
    CANDIDATE: {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    "adamw": {LR: (0.08,), MATRIX_LR: (0.0015, 0.003, 0.006, 0.012)},
    "adamw-one-lr": {LR: (0.0015, 0.003, 0.006, 0.012)},
}
PAPER_GRIDS: dict[str, Grid] = {
    CANDIDATE: {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    "adamw": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    "adamw-one-lr": {LR: (0.0005, 0.001, 0.002, 0.004)},
}


def arms_at(size: float, shared: SharedConfig, grids: dict[str, Grid]) -> tuple[Arm, ...]:
    """Return the recipes with a batch of ``size`` sequences, on the tokens of ``shared``."""
    training = shared.training
    steps = round(training.steps * training.batch_size / size)
    overrides = {
        "training.batch_size": int(size),
        "training.steps": steps,
        "evaluation.every_steps": max(1, steps // 10),
        "checkpoint.every_steps": max(1, steps // 4),
    }
    if training.micro_batch_size is not None:
        overrides["training.micro_batch_size"] = min(training.micro_batch_size, int(size))
    return tuple(
        Arm(
            f"{recipe}-batch{size:g}",
            {"optimizer.recipe": recipe, **overrides},
            grid,
            value=float(size),
            control=recipe != CANDIDATE,
        )
        for recipe, grid in grids.items()
    )


def judge(results: StudyResults) -> Verdict:
    """Compare at every size, and say whether SinkGD's standing changes with it."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    sentences, standings = [], []
    for one in results.candidates:
        for control in _at_the_same_size(results, one):
            difference = results.difference(one, control)
            sentences.append(compared(one.arm.name, difference, control.arm.name))
            if _recipe(control) == "adamw":
                standings.append((one.arm.value or 0.0, difference))
    lower = [f"{size:g}" for size, difference in standings if difference.lower]
    higher = [f"{size:g}" for size, difference in standings if difference.higher]
    if not standings:
        headline = "No batch has a result of both SinkGD and AdamW yet."
    elif not lower and not higher:
        headline = "SinkGD and the fair AdamW are level at every batch that has results."
    else:
        parts = [
            f"ends {word} than the fair AdamW at a batch of {', '.join(sizes)}"
            for word, sizes in (("lower", lower), ("higher", higher))
            if sizes
        ]
        rest = len(standings) - len(lower) - len(higher)
        headline = f"SinkGD {' and '.join(parts)} sequences{', level elsewhere' if rest else ''}."
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _at_the_same_size(results: StudyResults, one: ArmResults) -> list[ArmResults]:
    return [control for control in results.controls if control.arm.value == one.arm.value]


def _recipe(one: ArmResults) -> str:
    return str(one.arm.overrides["optimizer.recipe"])


def _setting(
    shared: SharedConfig,
    sizes: tuple[int, ...],
    grids: dict[str, Grid],
    models: Mapping[str, SharedConfig] = NOTHING,
) -> Setting:
    arms = tuple(arm for size in sizes for arm in arms_at(size, shared, grids))
    return Setting(
        shared, arms, at=lambda value, given: arms_at(value, given, grids), models=models
    )


BATCH = Study(
    name="batch",
    question="Does SinkGD hold against AdamW as the batch grows?",
    background="Two independent reports find plain SinkGD behind AdamW at larger batches. Every "
    "arm sees the same number of tokens; a larger batch takes fewer steps.",
    settings={
        "machine": _setting(MACHINE, SIZES, GRIDS),
        "paper": _setting(BENCHMARK["llama-60m"], PAPER_SIZES, PAPER_GRIDS, BENCHMARK),
    },
    judge=judge,
    axis=Axis("batch", "batch, sequences", log=True),
)
