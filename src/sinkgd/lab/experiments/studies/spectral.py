"""How much of whitening's gain remains with less whitening."""

from collections.abc import Mapping
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    BENCHMARK,
    LR,
    MACHINE,
    MATRIX_LR,
    controls,
    muon,
)
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    ended,
    names,
    ranked,
    unfinished,
)

NONE, WHOLE = "sinkgd-paper", "swan-5"
WAYS: Mapping[str, Mapping[str, Any]] = {
    NONE: {"recipe": "sinkgd-paper"},
    "rows-only": {"recipe": "rows-only"},  # (GGᵀ)^(-1/2) with only the diagonal of GGᵀ
    "pinned": {"recipe": "sinkgd-paper", "operator_norm": "muon"},
    "swan-1": {"recipe": "swan", "newton_schulz_steps": 1},
    "swan-2": {"recipe": "swan", "newton_schulz_steps": 2},
    "swan-3": {"recipe": "swan", "newton_schulz_steps": 3},
    WHOLE: {"recipe": "swan", "newton_schulz_steps": 5},
    "sinkgd": {"recipe": "sinkgd"},
    "swan-attention": {"recipe": "swan", "whitened": "attention"},
    "swan-mlp": {"recipe": "swan", "whitened": "mlp"},
}
# Each grid has four points. With a pinned operator norm, a rate is in units of singular values, not
# of root mean squares: at 0.02 the blocks of llama-nano hardly change.
RATES = (0.001, 0.002, 0.004, 0.008)
PINNED_RATES = (0.04, 0.08, 0.16, 0.32)
ADAMW_RATES = (0.0015, 0.003, 0.006, 0.012)
ONE_RATES = (0.0015, 0.003, 0.006, 0.012)
MUON_RATES = (0.005, 0.01, 0.02, 0.04)


def setting(lr: float) -> tuple[Arm, ...]:
    """Return the arms for every amount of whitening, and the controls.

    Args:
        lr: Learning rate of all parameters except matrices.
    """

    def grid(rates: tuple[float, ...]) -> Grid:
        return {LR: (lr,), MATRIX_LR: rates}

    arms = tuple(
        Arm(
            name,
            {f"optimizer.{key}": x for key, x in way.items()},
            grid(PINNED_RATES if "operator_norm" in way else RATES),
        )
        for name, way in WAYS.items()
    )
    return (*arms, *controls(grid(ADAMW_RATES), {LR: ONE_RATES}), muon(grid(MUON_RATES)))


def judge(results: StudyResults) -> Verdict:
    """Name the cheapest arm that is level with SWAN, and give the gain and the cost of each."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    none, whole = results.arm(NONE), results.arm(WHOLE)
    if none is None or whole is None:
        best = ranked(results.candidates)[0]
        return Verdict(
            f"{ended(best)}; {NONE} and {WHOLE} do not both have results.",
            (),
            tuple(cautions(results)),
        )
    gain = results.difference(whole, none)
    if not gain.lower:
        headline = f"There is no gain to keep: {ended(whole)}, and {ended(none)}."
        return Verdict(headline, tuple(_costs(results)), tuple(cautions(results)))
    others = [one for one in ranked(results.candidates) if one not in (none, whole)]
    alike = [
        one
        for one in others
        if (difference := results.difference(one, whole)).level or difference.lower
    ]
    headline = f"Whitening lowers the loss by {-gain.mean:.3f} ± {gain.half_width:.3f}. "
    headline += (
        f"Not measurably worse than {WHOLE}: {names(alike)}."
        if alike
        else f"No other arm is known to be level with {WHOLE}."
    )
    if alike and results.times_comparable:
        cheapest = min([*alike, whole], key=_optimizer_seconds)
        headline = f"{headline.removesuffix('.')}; {cheapest.arm.name} costs the least."
    own = [(one, results.difference(one, none)) for one in others]
    gains = [f"{one.arm.name} {d.mean:+.3f} ± {d.half_width:.3f}" for one, d in own]
    sentences = [f"Differences from {NONE}: {', '.join(gains)}.", *_costs(results)]
    sentences += [
        compared(one.arm.name, difference, WHOLE)
        for one in others
        if (difference := results.difference(one, whole)).lower
    ]
    sentences += against_controls(results, ranked(results.candidates)[0])
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _optimizer_seconds(one: ArmResults) -> float:
    """Return the median time of the optimizer in a step, over all seeds; infinite without steps."""
    steps = [s.optimizer_seconds for result in one.seeds for s in result.run.steps]
    return sorted(steps)[len(steps) // 2] if steps else float("inf")


def _costs(results: StudyResults) -> list[str]:
    if not results.times_comparable:
        return []
    costs = [
        f"{one.arm.name} {1000 * seconds:.1f}"
        for one in results.candidates
        if (seconds := _optimizer_seconds(one)) < float("inf")
    ]
    return [f"Milliseconds of the optimizer in a step: {', '.join(costs)}."] if costs else []


SPECTRAL = Study(
    name="spectral",
    question="How much of whitening’s gain is left with fewer steps, on fewer layers, or at O(mn)?",
    background="SWAN normalizes rows and then whitens; it is stateless, too. Its matrix products "
    "cost O(m²n). Row norms use only the diagonal, and a pinned operator norm only the largest "
    "singular value.",
    settings={
        "machine": Setting(MACHINE, setting(0.08)),
        "paper": Setting(BENCHMARK["llama-130m"], setting(0.02), models=BENCHMARK),
    },
    judge=judge,
)
