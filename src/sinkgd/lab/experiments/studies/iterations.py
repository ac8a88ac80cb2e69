"""How many iterations of SR-Sinkhorn a step needs."""

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    BENCHMARK,
    MACHINE,
    PAPER_SINKGD_GRID,
    SINKGD_GRID,
    controls,
    paper_controls,
)
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    ended,
    level_with,
    names,
    ranked,
    unfinished,
)

ITERATION_COUNTS = (1, 3, 5, 10)


def arm_with(iterations: float, grid: Grid = SINKGD_GRID) -> Arm:
    """Return the paper's SinkGD with this number of iterations."""
    overrides = {
        "optimizer.recipe": "sinkgd-paper",
        "optimizer.sinkhorn_iterations": int(iterations),
    }
    return Arm(f"L{iterations:g}", overrides, grid, value=float(iterations))


def judge(results: StudyResults) -> Verdict:
    """Find the smallest number of iterations that is level with the best."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    best = ranked(results.candidates)[0]
    headline = _headline(results, best)
    fewest = min(results.candidates, key=lambda one: one.arm.value or 0)
    sentences = [f"{ended(best)}, the lowest of {names(results.candidates)}."]
    if best is not fewest:
        difference = results.difference(fewest, best)
        sentences.append(compared(fewest.arm.name, difference, best.arm.name))
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _headline(results: StudyResults, best: ArmResults) -> str:
    if len(results.candidates) == 1:
        return f"{ended(best)}; no other number of iterations has a result."
    others = [one for one in results.candidates if one is not best]
    if any(results.difference(one, best).unknown for one in others):
        return f"{ended(best)}, the lowest; more seeds are needed to compare the others with it."
    level = level_with(results, best, results.candidates)
    if not level:
        return f"{ended(best)}, lower than every other number of iterations."
    enough = min([best, *level], key=lambda one: one.arm.value or 0)
    if len(level) == len(results.candidates) - 1:
        return (
            f"{enough.arm.name} is enough: no number of iterations ends lower, beyond the spread "
            "of seeds."
        )
    if enough is best:
        return f"{best.arm.name} is enough: more iterations end no lower."
    return f"{enough.arm.name} is enough: it is level with {best.arm.name}, the lowest."


ITERATIONS = Study(
    name="iterations",
    question="How many iterations of SR-Sinkhorn does a step need?",
    background="Scetbon et al. 2025 use L = 5. At 130M they report perplexities for L = 1 and "
    "L = 5 that differ by 0.08.",
    settings={
        "machine": Setting(
            MACHINE,
            (*map(arm_with, ITERATION_COUNTS), *controls()),
            at=lambda value, _: (arm_with(value),),
        ),
        "paper": Setting(
            BENCHMARK["llama-130m"],
            (*(arm_with(n, PAPER_SINKGD_GRID) for n in ITERATION_COUNTS), *paper_controls()),
            at=lambda value, _: (arm_with(value, PAPER_SINKGD_GRID),),
            models=BENCHMARK,
        ),
    },
    judge=judge,
    axis=Axis("iterations", "iterations of SR-Sinkhorn, L", log=True),
)
