"""How the gain over AdamW changes with the size of the model.

The rules of the training are those of `ladder_arms`, and the share q is that of `ladder_shares`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean

from sinkgd.lab.experiments.fits import Trend
from sinkgd.lab.experiments.studies.ladder_arms import (
    COMPARED,
    FAR_PRESET,
    GRIDS,
    METHODS,
    PAPER_GRIDS,
    PAPER_SIZES,
    SIZES,
    arms,
    hidden_weights,
    machine_sizes,
    paper_sizes,
)
from sinkgd.lab.experiments.studies.ladder_shares import (
    fit_of,
    has_failed,
    known,
    shares,
    sizes_of,
    trend_of,
)
from sinkgd.lab.experiments.studies.settings import BENCHMARK, MACHINE
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_charts import whiskers
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, unfinished
from sinkgd.lab.report.figures import (
    Chart,
    Figure,
    Identities,
    Identity,
    axis,
    dotted_line,
    layout,
)
from sinkgd.lab.report.quantities import count, percent
from sinkgd.lab.report.token_share import MeanShare


def judge(results: StudyResults) -> Verdict:
    """State q at every size, its trend, and the fits."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    lines = {method: shares(results, method) for method in COMPARED}
    sentences = [
        _shares_in_words(method, own, with_intervals=True) for method, own in lines.items()
    ]
    sentences += [
        _trend_in_words(method, trend, max(own))
        for method, own in lines.items()
        if (trend := trend_of(results, method)) is not None
    ]
    sentences += [
        f"{method}: L = {found.a:.2f} + {found.b:.2f} (C/C₁)^-{found.c:.3f}, exponent between "
        f"{found.c_low:.3f} and {found.c_high:.3f}."
        for method in METHODS
        if (found := fit_of(results, method)) is not None
    ]
    if any(map(has_failed, lines.values())):
        sentences.append(
            "A run failed if it diverged, or if the first evaluation of the run that it is "
            "compared with is as low as its end."
        )
    sentences += [*_RULES, *_deflated_part(results)]
    return Verdict(_headline(results), tuple(sentences), tuple(cautions(results)))


_RULES = (
    "At each size, the better AdamW is the one of adamw and adamw-0.5 with the lower loss. A share "
    "above 100 % is the inverse of the share with which this AdamW reaches the other method’s "
    "loss. Shares are read from losses during training, when the schedule was not over yet.",
    "Grids grow only at the two smallest sizes. Larger models take the best rates of the second "
    "one, with the rate of matrices divided by the width for all methods but Muon; the largest "
    "size tries its half and its double, too. If these rates suit a method less than another, its "
    "shares err in the same direction at all these sizes. No interval covers this.",
    "Intervals are 95 %, by Student’s t: those of shares over the seeds of a size, those of trends "
    "over the means of the sizes, those of exponents over all runs. Exponents were searched "
    "between 0.01 and 2.",
    "Nothing here tells the size of the model from what else grows with it: the number of steps, "
    "the batch, and the part of the parameters that are hidden weights.",
)


def _deflated_part(results: StudyResults) -> list[str]:
    """Say which part of the width is deflated at the smallest and at the largest size."""
    runs = [one.seeds[0].run.start for one in sizes_of(results, "sinkgd")]
    ranks = [start.config.get("optimizer", {}).get("deflated_rank") for start in runs]
    widths = [start.inputs.get("model", {}).get("hidden_size") for start in runs]
    if len(runs) < 2 or len(set(ranks)) > 1 or not all((*ranks, *widths)):
        return []
    least, most = (percent(ranks[0] / width) for width in (widths[0], widths[-1]))
    return [
        f"sinkgd deflates {ranks[0]} directions at every size: {least} of the smallest width and "
        f"{most} of the largest so far. A trend in the tokens that it needs may come from this."
    ]


def _headline(results: StudyResults) -> str:
    own, trend = shares(results, "sinkgd"), trend_of(results, "sinkgd")
    if trend is None:
        words = _shares_in_words("sinkgd", own)
        if not any(map(known, own.values())):
            return words
        ends = "no trend, because a run failed" if has_failed(own) else "no trend yet"
        return f"{words.removesuffix('.')}; {ends}."
    first, last = (geometric_mean(own[n]) for n in (min(own), max(own)))
    moves = "does not change measurably with the size"
    if trend.doubling_high < 1:
        moves = "falls as the model grows"
    elif trend.doubling_low > 1:
        moves = "rises as the model grows"
    return (
        f"The share of the better AdamW’s tokens that sinkgd needs {moves}: {percent(first)} at "
        f"{count(min(own))} hidden weights, {percent(last)} at {count(max(own))}"
        f"{_if_above(own)}; a factor of {_factor_in_words(trend)} for each doubling."
    )


def _shares_in_words(
    method: str, own: Mapping[float, Sequence[float]], *, with_intervals: bool = False
) -> str:
    if not own:
        return f"{method} and AdamW have no results at the same size yet."
    if all(q == math.inf for values in own.values() for q in values):
        return f"{method} failed at every finished size."
    means = {n: _mean_in_words(qs, with_interval=with_intervals) for n, qs in own.items()}
    words = ", ".join(f"{mean} at {count(n)}" for n, mean in means.items())
    return (
        f"For the final loss of the better AdamW, {method} needs this share of its tokens: {words} "
        f"hidden weights{_if_above(own)}."
    )


def _if_above(own: Mapping[float, Sequence[float]]) -> str:
    above = any(geometric_mean(qs) > 1 for qs in map(known, own.values()) if qs)
    return " (above 100 %: not reached)" if above else ""


def _mean_in_words(own: Sequence[float], *, with_interval: bool = False) -> str:
    """Return the geometric mean over the seeds that have a share, and how many failed.

    >>> _mean_in_words([0.5, 0.7, math.inf])
    '59\N{NO-BREAK SPACE}% (failed in 1 of 3 seeds)'
    >>> _mean_in_words([0.5, math.nan])
    '50\N{NO-BREAK SPACE}% (AdamW failed in 1 of 2 seeds)'
    >>> _mean_in_words([0.8, 0.81, 0.82], with_interval=True)
    '81\N{NO-BREAK SPACE}% (79 to 84\N{NO-BREAK SPACE}%)'
    """
    failed, of_adamw = sum(q == math.inf for q in own), sum(map(math.isnan, own))
    counts = {"failed": failed, "AdamW failed": of_adamw}
    notes = "; ".join(f"{who} in {n} of {len(own)} seeds" for who, n in counts.items() if n)
    share = MeanShare.of(known(own))
    if share is None:
        return notes
    words = str(share) if with_interval else percent(share.mean)
    return words + (f" ({notes})" if notes else "")


def _trend_in_words(method: str, trend: Trend, largest: float) -> str:
    words = (
        f"With each doubling of the weights {method}’s share changes by a factor of "
        f"{_factor_in_words(trend)}."
    )
    if largest >= hidden_weights(FAR_PRESET):  # at the paper's scale
        return words
    return (
        f"{words} If this held up to {FAR_PRESET}, the share would be {percent(trend.far)} "
        f"({percent(trend.far_low)} to {percent(trend.far_high)})."
    )


def _factor_in_words(trend: Trend) -> str:
    return f"{trend.doubling:.3f} ({trend.doubling_low:.3f} to {trend.doubling_high:.3f})"


def charts(results: StudyResults, identities: Identities) -> list[Chart]:
    """Draw the share of AdamW's tokens over the size, one line per method."""
    shown = {method: shares(results, method) for method in COMPARED}
    lines = {
        method: {n: known(own[n]) for n in own if known(own[n])}
        for method, own in shown.items()
        if any(map(known, own.values()))
    }
    if not lines:
        return []
    sizes = sorted({n for own in lines.values() for n in own})
    looks = {method: identities[sizes_of(results, method)[-1].arm.name] for method in lines}
    return [
        Chart(
            key="share-by-size",
            title="Tokens to AdamW’s final loss, by size",
            caption="Tokens that an arm needs for the final loss of the better AdamW at the "
            "same size and with the same seed, as a share of AdamW’s tokens: geometric mean and "
            "range over seeds. Lower is better. Above 100 % AdamW reaches the arm’s loss earlier; "
            "the share is then the inverse of AdamW’s. Runs that failed are left out.",
            description="; ".join(_shares_in_words(method, shown[method]) for method in lines),
            figure={
                "data": [_share_line(r, own, looks[r]) for r, own in lines.items()],
                "layout": layout(
                    400,
                    xaxis=axis(
                        "hidden weights, N",
                        type="log",
                        tickvals=sizes,
                        ticktext=[count(n) for n in sizes],
                    ),
                    yaxis=axis("share of AdamW’s tokens", tickformat=".0%"),
                    shapes=[dotted_line(1.0, color="@soft", width=1.6)],
                    hovermode="closest",
                ),
            },
            share=1,
        )
    ]


def _share_line(method: str, own: Mapping[float, Sequence[float]], look: Identity) -> Figure:
    means = [geometric_mean(q) for q in own.values()]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": method,
        "x": list(own),
        "y": means,
        "line": {"color": look.color, "width": 2.2},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 9},
        "error_y": whiskers(means, [(min(q), max(q)) for q in own.values()], look),
        "hovertemplate": f"{method} at %{{x:.3s}}: %{{y:.0%}}<extra></extra>",
    }


_MACHINE = replace(MACHINE, evaluation=replace(MACHINE.evaluation, tokens=32_768))

LADDER = Study(
    name="ladder",
    question="Does SinkGD’s gain over AdamW grow with the size of the model?",
    background="The default reaches the fair AdamW’s loss with 84 % of its tokens in study "
    "`table1`, and with 78 % in `recipes`, which trains longer, on models of 1.3 million weights. "
    "Scetbon et al. report gains at 60 million to 1.3 billion weights over an AdamW with one rate.",
    settings={
        "machine": Setting(_MACHINE, arms(machine_sizes(SIZES, _MACHINE), GRIDS)),
        "paper": Setting(BENCHMARK[PAPER_SIZES[0]], arms(paper_sizes(PAPER_SIZES), PAPER_GRIDS)),
    },
    judge=judge,
    charts=charts,
    axis=Axis("hidden-weights", "hidden weights, N", log=True),
)
