"""How much of SinkGD's gain is left if AdamW and Muon have less momentum.

SinkGD has no momentum for matrices. A short training may favor that: the usual 0.9 and 0.95 average
gradients over ten and twenty steps.
"""

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    cautions,
    compared,
    fewest_tokens,
    ranked,
    unfinished,
)

BETA1, MOMENTUM = "optimizer.beta1", "optimizer.momentum"
# The option of each recipe that is varied, and its values. SinkGD's beta1 is that of embeddings,
# head and vectors, which AdamW trains.
VARIED = {
    "adamw": (BETA1, (0.0, 0.5, 0.8, 0.9)),
    "muon": (MOMENTUM, (0.5, 0.8, 0.95)),
    "sinkgd": (BETA1, (0.5, 0.9)),
}
USUAL = ("adamw-0.9", "muon-0.95")

GRIDS: dict[str, Grid] = {
    "adamw": {LR: (0.08,), MATRIX_LR: (0.0015, 0.003, 0.006)},
    "muon": {LR: (0.08,), MATRIX_LR: (0.005, 0.01, 0.02)},
    "sinkgd": {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004)},
}
PAPER_GRIDS: dict[str, Grid] = {
    "adamw": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "muon": {LR: (0.02,), MATRIX_LR: (0.0025, 0.005, 0.01)},
    "sinkgd": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
}


def arms_of(grids: dict[str, Grid]) -> tuple[Arm, ...]:
    """Return one arm for each recipe and value; the usual values of AdamW and Muon are controls."""
    return tuple(
        Arm(
            f"{recipe}-{value:g}",
            {"optimizer.recipe": recipe, option: value},
            grids[recipe],
            value=value,
            series=recipe,
            widened=True,
            control=f"{recipe}-{value:g}" in USUAL,
        )
        for recipe, (option, values) in VARIED.items()
        for value in values
    )


def _best_of(results: StudyResults, recipe: str) -> ArmResults | None:
    arms = (*results.candidates, *results.controls)
    own = [one for one in ranked(arms) if _recipe(one) == recipe and one.loss is not None]
    return own[0] if own else None


def judge(results: StudyResults) -> Verdict:
    """Compare the best SinkGD with the best AdamW and Muon, and these with their usual form."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    own, adamw, muon = (_best_of(results, recipe) for recipe in ("sinkgd", "adamw", "muon"))
    others = [one for one in (adamw, muon) if one is not None]
    if own is None or not others:
        headline = "SinkGD or both methods with momentum have no result yet."
        return Verdict(headline, (), tuple(cautions(results)))
    headline = " ".join(
        compared(own.arm.name, results.difference(own, other), other.arm.name) for other in others
    )
    names = [one.arm.name for one in results.candidates if _recipe(one) == "sinkgd"]
    sentences = [fewest_tokens(results, other, "with SinkGD", names) for other in others]
    sentences += [
        compared(other.arm.name, results.difference(other, control), control.arm.name)
        for other in others
        for control in results.controls
        if control is not other and _recipe(control) == _recipe(other)
    ]
    # The best arm and the controls are all forms of the baselines, whose cost is not the question.
    return Verdict(headline, tuple(sentences), tuple(cautions(results)), may_name_cost=False)


def _recipe(one: ArmResults) -> object:
    return one.arm.overrides["optimizer.recipe"]


BETA1S = Study(
    name="beta1",
    question="How much of the gain over AdamW is left if AdamW has less momentum?",
    background="In the other studies AdamW has the usual beta1 of 0.9 and Muon a momentum of 0.95, "
    "while SinkGD’s matrices have no momentum. A training of 240 steps may be too short for "
    "averages over ten and twenty steps.",
    settings={
        "machine": Setting(MACHINE, arms_of(GRIDS)),
        "paper": Setting(BENCHMARK["llama-60m"], arms_of(PAPER_GRIDS)),
    },
    judge=judge,
    axis=Axis("beta1", "beta1; Muon’s momentum"),
)
