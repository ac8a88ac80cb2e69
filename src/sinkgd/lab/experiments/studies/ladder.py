"""How the gain over AdamW changes with the size of the model.

Rules (at the paper's scale, tokens and batch are instead those of the benchmark):
    tokens: 20 for each hidden weight, so that the training takes C ∝ N² operations
    batch: grows as the square root of the tokens, and so does the number of steps
    rates: each method is tuned at the two smallest sizes, on grids that grow until their best point
        is inside. Larger models take the method's best rates at the second smallest size, but the
        rate of matrices shrinks as 1/d with the width d. That is a compromise: in study `width` the
        largest good rate falls about as 1/d with deflation and as d^-1.5 without, and AdamW's is
        unknown. Muon's rate does not shrink, because Muon scales its updates by the shape of the
        matrix. At the largest size, the resulting rate of matrices, its half and its double are
        tried.

Letters:
    N: number of hidden weights, which are those of the blocks' matrices
    C: operations of a training, 6 for each hidden weight and token
    L: final validation loss, nats per token; fitted as a + b (C/C₁)^(-c), see `PowerLaw`
    q: tokens that an arm needs for the final loss of the better AdamW, as a share of all tokens.
        An arm that ends above this loss has q = 1/p instead, where p is the share of the tokens
        with which AdamW reaches the arm's final loss. So q is below 1 if the arm needs fewer tokens
        than AdamW, and above 1 if it needs more.

There are two AdamWs, with a beta1 of 0.9 and of 0.5. The better one has the lower mean loss at a
size. There are two Muons, too, with a momentum of 0.95 and of 0.5.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Carried, Grid
from sinkgd.lab.experiments.fits import PowerLaw, Trend, fit_power_law, fit_trend
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_charts import whiskers
from sinkgd.lab.experiments.study_record import RunResult
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, unfinished
from sinkgd.lab.models.presets import preset_config
from sinkgd.lab.report.analysis import first_reach
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
from sinkgd.lab.train.config import SharedConfig

TOKENS_PER_WEIGHT = 20
SIZES = ("llama-nano-32", "llama-nano-48", "llama-nano-64", "llama-nano-96")
PAPER_SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
FAR_PRESET = "llama-60m"  # the model to which the trend of smaller ones is extrapolated
SEEDS = (3, 3, 2, 2)  # by size
CHECKED = (0.5, 1.0, 2.0)  # multiples of the carried rate that the largest size tries
SMALLEST_BATCH = 16  # sequences at the smallest size

# The recipe of each method, and what else defines it.
METHODS: Mapping[str, Mapping[str, str | float]] = {
    "sinkgd": {"optimizer.recipe": "sinkgd"},
    "sinkgd-paper": {"optimizer.recipe": "sinkgd-paper"},
    "adamw": {"optimizer.recipe": "adamw"},
    "adamw-0.5": {"optimizer.recipe": "adamw", "optimizer.beta1": 0.5},
    "muon": {"optimizer.recipe": "muon"},
    "muon-0.5": {"optimizer.recipe": "muon", "optimizer.momentum": 0.5},
}
ADAMWS = ("adamw", "adamw-0.5")
COMPARED = tuple(method for method in METHODS if method not in ADAMWS)  # with the better AdamW
_NOT_BY_WIDTH = {"muon", "muon-0.5"}

# Three rates of matrices at the two smallest sizes, each twice the previous one. As the grids grow,
# they get other rates of embeddings and head, too.
GRIDS: Mapping[str, Grid] = {
    "sinkgd": {LR: (0.08,), MATRIX_LR: (0.002, 0.004, 0.008)},
    "sinkgd-paper": {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "adamw": {LR: (0.08,), MATRIX_LR: (0.003, 0.006, 0.012)},
    "adamw-0.5": {LR: (0.08,), MATRIX_LR: (0.003, 0.006, 0.012)},
    "muon": {LR: (0.08,), MATRIX_LR: (0.01, 0.02, 0.04)},
    "muon-0.5": {LR: (0.08,), MATRIX_LR: (0.01, 0.02, 0.04)},
}
PAPER_GRIDS: Mapping[str, Grid] = {
    "sinkgd": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "sinkgd-paper": {LR: (0.02,), MATRIX_LR: (0.0005, 0.001, 0.002)},
    "adamw": {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "adamw-0.5": {LR: (0.02,), MATRIX_LR: (0.001, 0.002, 0.004)},
    "muon": {LR: (0.02,), MATRIX_LR: (0.005, 0.01, 0.02)},
    "muon-0.5": {LR: (0.02,), MATRIX_LR: (0.005, 0.01, 0.02)},
}


def hidden_weights(preset: str) -> int:
    """Return N of a preset."""
    return preset_config(preset).linear_parameter_count


def machine_sizes(presets: Sequence[str], shared: SharedConfig) -> dict[str, dict[str, Any]]:
    """Return each preset's batch and steps by the rules above, with some 20 evaluations."""
    length, least = shared.training.sequence_length, hidden_weights(presets[0])
    found = {}
    for preset in presets:
        tokens = TOKENS_PER_WEIGHT * hidden_weights(preset)
        batch = round(SMALLEST_BATCH * math.sqrt(hidden_weights(preset) / least) / 4) * 4
        steps = round(tokens / (batch * length))
        found[preset] = {
            "training.batch_size": batch,
            "training.steps": steps,
            "evaluation.every_steps": max(1, steps // 20),
            "checkpoint.every_steps": max(1, steps // 10),
        }
    return found


def paper_sizes(presets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each preset's steps and batches in the benchmark.

    The benchmark has about 20 tokens for each weight of a model, but only 10 for llama-1b.
    """
    return {
        preset: {
            "training.steps": one.training.steps,
            "training.micro_batch_size": one.training.micro_batch_size,
            "evaluation.batch_size": one.evaluation.batch_size,
        }
        for preset in presets
        for one in [BENCHMARK[preset]]
    }


def arms(sizes: Mapping[str, Mapping[str, Any]], grids: Mapping[str, Grid]) -> tuple[Arm, ...]:
    """Return one arm per method and size, from the smallest size on."""
    presets = list(sizes)
    tuned = presets[1]  # the size whose rates larger ones take
    found = []
    for place, preset in enumerate(presets):
        for method, overrides in METHODS.items():
            narrower = preset_config(tuned).hidden_size / preset_config(preset).hidden_size
            factor = 1.0 if method in _NOT_BY_WIDTH else narrower
            last = place == len(presets) - 1
            found.append(
                Arm(
                    f"{method}-{preset.removeprefix('llama-')}",
                    {"model.preset": preset, **overrides, **sizes[preset]},
                    grids[method] if place < 2 else {},
                    value=float(hidden_weights(preset)),
                    control=method not in ("sinkgd", "sinkgd-paper"),
                    series=method,
                    widened=place < 2,
                    carried=None
                    if place < 2
                    else Carried(
                        f"{method}-{tuned.removeprefix('llama-')}",
                        {MATRIX_LR: factor},
                        CHECKED if last else (1.0,),
                    ),
                    seeds=SEEDS[place],
                )
            )
    return tuple(found)


def _sizes(results: StudyResults, method: str) -> list[ArmResults]:
    """Return a method's arms that have reported runs, from the smallest size to the largest."""
    own = [one for one in results.arms if one.arm.series == method and one.seeds]
    return sorted(own, key=lambda one: one.arm.value or 0.0)


def _better_adamw(results: StudyResults) -> dict[float | None, ArmResults]:
    """Return the AdamW with the lower mean loss at each size, over the seeds that both have."""
    both: dict[float | None, list[ArmResults]] = {}
    for method in ADAMWS:
        for one in _sizes(results, method):
            both.setdefault(one.arm.value, []).append(one)
    found = {}
    for value, arms in both.items():
        common = set.intersection(*(set(one.losses) for one in arms))
        found[value] = min(arms, key=lambda one: sum(one.losses[seed] for seed in common))
    return found


def _compute(one: ArmResults) -> float:
    end = one.seeds[0].run.end
    return 6 * (one.arm.value or 0.0) * (end.tokens if end else math.nan)


def fit_of(results: StudyResults, method: str) -> PowerLaw | None:
    """Fit the losses of a method over sizes, without sizes at which a seed diverged.

    None if fewer than 4 sizes are left.
    """
    sizes = [one for one in _sizes(results, method) if not one.diverged]
    if len(sizes) < 4:
        return None
    runs = [(_compute(one), loss) for one in sizes for loss in one.losses.values()]
    return fit_power_law([compute for compute, _ in runs], [loss for _, loss in runs])


def shares(results: StudyResults, method: str) -> dict[float, list[float]]:
    """Return q by N, one for each seed that the method ran and in which AdamW has a finite loss.

    q is infinite for a seed that diverged, and for all of AdamW's seeds if the method diverged at
    every rate of its grid.
    """
    control = _better_adamw(results)
    found = {}
    for one in results.arms:
        if one.arm.series != method or (other := control.get(one.arm.value)) is None:
            continue
        goals = {r.seed: r for r in other.seeds if math.isfinite(r.loss)}
        if one.chosen is None and len(one.grid) >= one.arm.efforts > 0:
            own = [math.inf] * len(goals)
        else:
            own = [_share(r, goals[r.seed]) for r in one.seeds if r.seed in goals]
        if own:
            found[one.arm.value or math.nan] = own
    return dict(sorted(found.items()))


def _share(one: RunResult, adamw: RunResult) -> float:
    if not math.isfinite(one.loss):
        return math.inf
    if one.loss > adamw.loss:
        return 1 / _share(adamw, one)
    reach, end = first_reach(one.run.evaluations, adamw.loss), one.run.end
    return reach.tokens / end.tokens if reach and end else math.inf


def _finite(own: Sequence[float]) -> list[float]:
    return [q for q in own if math.isfinite(q)]


def _diverged(own: Mapping[float, Sequence[float]]) -> bool:
    """Whether a method diverged in a seed of any size."""
    return any(len(_finite(values)) < len(values) for values in own.values())


def trend_of(results: StudyResults, method: str) -> Trend | None:
    """Fit the trend of a method's q over the sizes.

    None below 3 sizes and before every size of the study has a run, and if a seed diverged: without
    that seed the trend would be biased in favor of the method.
    """
    found = shares(results, method)
    planned = {one.arm.value for one in results.arms if one.arm.series == method}
    if len(found) < max(3, len(planned)) or _diverged(found):
        return None
    points = [(n, q) for n, own in found.items() for q in own]
    far = hidden_weights(FAR_PRESET)
    return fit_trend([n for n, _ in points], [q for _, q in points], far=far)


def judge(results: StudyResults) -> Verdict:
    """State q at every size, its trend, and the fits."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    lines = {method: shares(results, method) for method in COMPARED}
    sentences = [_shares_in_words(method, own) for method, own in lines.items()]
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
    sentences.append(
        "At each size, the better AdamW is the one of adamw and adamw-0.5 with the lower loss. A "
        "share above 100 % is the inverse of the share with which this AdamW reaches the other "
        "method’s loss. Shares are read from losses during training, when the schedule was not "
        "over yet. Intervals are 95 %, by Student’s t: those of trends over the means of the "
        "sizes, those of exponents over all runs, which leaves out the choice of rates. None says "
        "anything about what else grows with the model: the number of steps, the batch, and the "
        "part of the parameters that are hidden weights. Exponents were searched between 0.01 and "
        "2."
    )
    return Verdict(_headline(results), tuple(sentences), tuple(cautions(results)))


def _headline(results: StudyResults) -> str:
    own, trend = shares(results, "sinkgd"), trend_of(results, "sinkgd")
    if trend is None:
        words = _shares_in_words("sinkgd", own)
        if not any(map(_finite, own.values())):
            return words
        ends = "no trend, because not every seed ended" if _diverged(own) else "no trend yet"
        return f"{words.removesuffix('.')}; {ends}."
    first, last = (geometric_mean(own[n]) for n in (min(own), max(own)))
    moves = "does not change measurably with the size"
    if trend.doubling_high < 1:
        moves = "falls as the model grows"
    elif trend.doubling_low > 1:
        moves = "rises as the model grows"
    return (
        f"The share of the better AdamW’s tokens that sinkgd needs {moves}: {percent(first)} at "
        f"{count(min(own))} hidden weights, {percent(last)} at {count(max(own))}; a factor of "
        f"{_factor_in_words(trend)} for each doubling."
    )


def _shares_in_words(method: str, own: Mapping[float, Sequence[float]]) -> str:
    if not own:
        return f"{method} and AdamW have no results at the same size yet."
    if not any(map(_finite, own.values())):
        return f"{method} diverged at every finished size."
    words = ", ".join(f"{_mean_in_words(values)} at {count(n)}" for n, values in own.items())
    return (
        f"For the final loss of the better AdamW, {method} needs this share of its tokens: {words} "
        "hidden weights."
    )


def _mean_in_words(own: Sequence[float]) -> str:
    """Return the geometric mean over the seeds that ended, and the number of those that diverged.

    >>> _mean_in_words([0.5, 0.7, math.inf])
    '59\N{NO-BREAK SPACE}% (1 of 3 seeds diverged)'
    """
    ended = _finite(own)
    if not ended:
        return "diverged"
    words, lost = percent(geometric_mean(ended)), len(own) - len(ended)
    return words + (f" ({lost} of {len(own)} seeds diverged)" if lost else "")


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
        method: {n: _finite(own[n]) for n in own if _finite(own[n])}
        for method, own in shown.items()
        if any(map(_finite, own.values()))
    }
    if not lines:
        return []
    sizes = sorted({n for own in lines.values() for n in own})
    looks = {method: identities[_sizes(results, method)[-1].arm.name] for method in lines}
    return [
        Chart(
            key="share-by-size",
            title="Tokens to AdamW’s final loss, by size",
            caption="Tokens that an arm needs for the final loss of the better AdamW at the "
            "same size and with the same seed, as a share of AdamW’s tokens: geometric mean and "
            "range over seeds. Lower is better. Above 100 % AdamW reaches the arm’s loss earlier; "
            "the share is then the inverse of AdamW’s. Seeds that diverged are left out.",
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
