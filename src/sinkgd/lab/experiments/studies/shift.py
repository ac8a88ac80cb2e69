"""How fast each method recovers when nearly all token ids are permuted during training."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import (
    BENCHMARK,
    LR,
    MACHINE,
    MATRIX_LR,
    PAPER_ADAMW_GRID,
    PAPER_MUON_GRID,
    PAPER_ONE_LR_GRID,
    PAPER_SINKGD_GRID,
    PAPER_SWAN_GRID,
    SINKGD_GRID,
    SWAN_GRID,
    controls,
    muon,
)
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_charts import rows_figure
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    ended,
    names,
    ranked,
    unfinished,
)
from sinkgd.lab.report import Spread, first_reach
from sinkgd.lab.report.figures import Chart, Identities, axis
from sinkgd.lab.report.quantities import count, loss
from sinkgd.lab.results import Run
from sinkgd.lab.train.config import SharedConfig

# The best matrix rates of AdamW and Muon are lower here than without a change of vocabulary.
ADAMW_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.0001875, 0.000375, 0.00075, 0.0015, 0.003, 0.006)}
MUON_GRID: Grid = {LR: (0.08,), MATRIX_LR: (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02)}


def shifted(shared: SharedConfig) -> SharedConfig:
    """Return a configuration whose vocabulary changes after 40 % of the steps.

    It has enough evaluations to interpolate the recovery between two of them.
    """
    steps = shared.training.steps
    return replace(
        shared,
        data=replace(shared.data, shift_at_step=2 * steps // 5),
        evaluation=replace(shared.evaluation, every_steps=steps // 30),
    )


def recovery(run: Run) -> float | None:
    """Return the number of tokens until the validation loss is back at its value before the change.

    Returns:
        The tokens after the last evaluation before the change, interpolated between evaluations;
        None if the loss is not back by the end.
    """
    at = int(run.start.config["data"]["shift_at_step"])
    before = [e for e in run.evaluations if e.step <= at]
    after = [e for e in run.evaluations if e.step > at]
    if not before or not after:
        return None
    point = first_reach(after, before[-1].val_loss)
    return None if point is None else point.tokens - before[-1].tokens


def _recoveries(one: ArmResults) -> list[float]:
    found = [recovery(result.run) for result in one.seeds]
    return [tokens for tokens in found if tokens is not None]


def judge(results: StudyResults) -> Verdict:
    """Rank the methods that recover in every seed by the tokens that they need."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    arms = [*results.candidates, *results.controls]
    whole = [one for one in arms if len(_recoveries(one)) == len(one.seeds)]
    means = {one.arm.name: Spread.of(_recoveries(one)) for one in whole}
    order = sorted(whole, key=lambda one: spread.mean if (spread := means[one.arm.name]) else 0.0)
    best = ranked(results.candidates)[0]
    if order and (fastest := means[order[0].arm.name]):
        headline = (
            f"{order[0].arm.name} is the first to be back at its loss before the change, "
            f"after {count(round(fastest.mean))} tokens."
        )
    else:
        headline = "No method is back at its loss before the change in every seed."
    sentences = [_words(one) for one in (*order, *(one for one in arms if one not in whole))]
    sentences.append(_targets(arms))
    sentences += [f"{ended(best)}, the lowest of {names(results.candidates)}."]
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


def _targets(arms: Sequence[ArmResults]) -> str:
    """Give the mean loss before the change, to which each arm has to come back."""
    losses = [(one.arm.name, [_before(r.run) for r in one.seeds]) for one in arms]
    words = [
        f"{name} {loss(statistics.fmean(found))}"
        for name, own in losses
        if (found := [value for value in own if value is not None])
    ]
    if not words:
        return "No method has a loss before the change."
    return (
        "Each method has to come back to its own loss before the change, and a higher one is "
        f"easier to reach: {', '.join(words)}."
    )


def _before(run: Run) -> float | None:
    """Return the last validation loss before the change."""
    at = int(run.start.config["data"]["shift_at_step"])
    losses = [e.val_loss for e in run.evaluations if e.step <= at]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def charts(results: StudyResults, identities: Identities) -> list[Chart]:
    """Draw every arm's recovery."""
    arms = [one for one in (*results.candidates, *results.controls) if one.seeds]
    rows = [(one.arm.name, _recoveries(one), _in_short(one)) for one in arms]
    return [_recovery_chart(rows, identities)]


def _recovery_chart(
    rows: Sequence[tuple[str, Sequence[float], str]], identities: Identities
) -> Chart:
    """Draw the tokens that each arm needed to recover from a change of vocabulary, one row per arm.

    Args:
        rows: For each arm its name, the tokens of every seed that recovered, and a label.
        identities: Colors and markers of the arms.
    """
    tokens = axis("tokens after the change", rangemode="tozero", tickformat="~s", fixedrange=True)
    return Chart(
        key="recovery",
        title="Tokens until the loss is back",
        caption="Tokens from the change of vocabulary until the validation loss is back at its "
        "last value before the change: every seed that recovered, and the mean and range of these "
        "seeds.",
        description=f"{'; '.join(f'{name}: {words}' for name, _, words in rows)}.",
        figure=rows_figure(rows, tokens, identities),
        share=1,
    )


def _in_short(one: ArmResults) -> str:
    spread, total = Spread.of(_recoveries(one)), len(one.seeds)
    if spread is None:
        return "not back"
    where = "" if spread.count == total else f", in {spread.count} of {total} seeds"
    return f"{count(round(spread.mean))}{where}"


def _words(one: ArmResults) -> str:
    spread, total = Spread.of(found := _recoveries(one)), len(one.seeds)
    if spread is None:
        return f"{one.arm.name} did not come back."
    tokens = f"after {count(round(spread.low))} to {count(round(spread.high))} tokens"
    where = "" if len(found) == total else f" in {len(found)} of {total} seeds"
    return f"{one.arm.name} came back {tokens}{where}."


def _candidates(sinkgd: Grid, swan: Grid) -> tuple[Arm, ...]:
    return (
        Arm("sinkgd-paper", {"optimizer.recipe": "sinkgd-paper"}, sinkgd),
        Arm("swan", {"optimizer.recipe": "swan"}, swan),
        Arm("sinkgd", {"optimizer.recipe": "sinkgd"}, swan),
    )


SHIFT = Study(
    name="shift",
    question="How fast does each method recover from a sudden change of vocabulary?",
    background="Between two steps all token ids are permuted: embedding and head are suddenly "
    "wrong, the blocks are not. A method without state has no averages of past gradients.",
    settings={
        "machine": Setting(
            shifted(MACHINE),
            (*_candidates(SINKGD_GRID, SWAN_GRID), *controls(ADAMW_GRID), muon(MUON_GRID)),
        ),
        "paper": Setting(
            shifted(BENCHMARK["llama-60m"]),
            (
                *_candidates(PAPER_SINKGD_GRID, PAPER_SWAN_GRID),
                *controls(PAPER_ADAMW_GRID, PAPER_ONE_LR_GRID),
                muon(PAPER_MUON_GRID),
            ),
            models={preset: shifted(shared) for preset, shared in BENCHMARK.items()},
        ),
    },
    judge=judge,
    charts=charts,
)
