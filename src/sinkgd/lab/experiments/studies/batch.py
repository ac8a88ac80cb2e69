"""How the paper's SinkGD and SinkGD with deflation compare with AdamW as the batch grows."""

from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.arms import EMPTY, Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, compared, unfinished
from sinkgd.lab.train.config import SharedConfig

PLAIN = "sinkgd-paper"
# Names that begin sentences.
CANDIDATES = {PLAIN: "The paper’s SinkGD", "sinkgd": "SinkGD with deflation"}
CONTROL, ONE_LR = "adamw", "adamw-one-lr"
SIZES = (4, 16, 64)  # sequences in a batch
PAPER_SIZES = (128, 512, 2048)

# Each grid has four points, which are tried at every batch size. AdamW with one rate for all
# parameters runs only at one size.
GRIDS: dict[str, Grid] = {
    PLAIN: {LR: (0.08,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    "sinkgd": {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004, 0.008)},
    CONTROL: {LR: (0.08,), MATRIX_LR: (0.0015, 0.003, 0.006, 0.012)},
    ONE_LR: {LR: (0.0015, 0.003, 0.006, 0.012)},
}
PAPER_GRIDS: dict[str, Grid] = {
    PLAIN: {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    "sinkgd": {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.004, 0.008)},
    CONTROL: {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002, 0.004)},
    ONE_LR: {LR: (0.0005, 0.001, 0.002, 0.004)},
}


def arms_at(size: float, shared: SharedConfig, grids: dict[str, Grid]) -> tuple[Arm, ...]:
    """Return the arms with a batch of ``size`` sequences and about as many tokens as ``shared``.

    ``adamw-one-lr`` is included only if ``size`` is the batch size of ``shared``.
    """
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
            control=recipe not in CANDIDATES,
        )
        for recipe, grid in grids.items()
        if recipe != ONE_LR or size == training.batch_size
    )


def judge(results: StudyResults) -> Verdict:
    """Compare the arms at every size, and say where a candidate differs from the fair AdamW."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    sentences = [
        compared(one.arm.name, results.difference(one, other), other.arm.name)
        for one in results.candidates
        for other in _beside(results, one)
    ]
    headline = " ".join(
        _standing(results, name, own)
        for recipe, name in CANDIDATES.items()
        if (own := [one for one in results.candidates if one.arm.recipe == recipe])
    )
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _standing(results: StudyResults, name: str, sizes: Sequence[ArmResults]) -> str:
    """Compare one candidate with the fair AdamW, the recipe ``adamw``, over all sizes."""
    standings = [
        (one.arm.value or 0.0, results.difference(one, control))
        for one in sizes
        for control in _beside(results, one)
        if control.arm.recipe == CONTROL
    ]
    if not standings:
        return f"{name} and the fair AdamW have no results at the same batch yet."
    lower = [f"{size:g}" for size, difference in standings if difference.lower]
    higher = [f"{size:g}" for size, difference in standings if difference.higher]
    unknown = [f"{size:g}" for size, difference in standings if difference.unknown]
    if unknown:
        listed = ", ".join(unknown)
        return f"More seeds are needed to compare {name} and the fair AdamW at a batch of {listed}."
    if not lower and not higher:
        return f"{name} and the fair AdamW are level at every batch that has results."
    parts = [
        f"ends {word} than the fair AdamW at a batch of {', '.join(found)}"
        for word, found in (("lower", lower), ("higher", higher))
        if found
    ]
    rest = len(standings) - len(lower) - len(higher)
    return f"{name} {' and '.join(parts)} sequences{', level elsewhere' if rest else ''}."


def _beside(results: StudyResults, one: ArmResults) -> list[ArmResults]:
    """List the arms to compare with at a candidate's size: the paper's SinkGD and the controls."""
    plain = [other for other in results.candidates if other.arm.recipe == PLAIN]
    return [
        other
        for other in (*plain, *results.controls)
        if other is not one and other.arm.value == one.arm.value
    ]


def _setting(
    shared: SharedConfig,
    sizes: tuple[int, ...],
    grids: dict[str, Grid],
    models: Mapping[str, SharedConfig] = EMPTY,
) -> Setting:
    arms = tuple(arm for size in sizes for arm in arms_at(size, shared, grids))
    return Setting(
        shared, arms, at=lambda value, given: arms_at(value, given, grids), models=models
    )


BATCH = Study(
    name="batch",
    question="Does SinkGD keep up with AdamW as the batch grows?",
    background="Two independent reports find the paper’s SinkGD behind AdamW at larger batches. "
    "All arms train on the same number of tokens, so a larger batch takes fewer steps.",
    settings={
        "machine": _setting(MACHINE, SIZES, GRIDS),
        "paper": _setting(BENCHMARK["llama-60m"], PAPER_SIZES, PAPER_GRIDS, BENCHMARK),
    },
    judge=judge,
    axis=Axis("batch", "batch, sequences", log=True),
)
