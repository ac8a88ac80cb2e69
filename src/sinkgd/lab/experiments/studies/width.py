"""How the best learning rate of matrices depends on the width of the model.

There are four rules for the size of an update, those of `rules`.

Below a certain rate the loss hardly depends on the rate; above it training breaks. The best rate of
a grid is therefore partly chance, and the largest rate that is still good says more. It is only
bounded if it is the largest of its grid, or if the lowest loss is at the smallest rate: a lower
loss at a smaller rate would make fewer rates good.

Letters:
    d: the hidden size
    p: the exponent in lr ∝ d^p, for the largest good rate lr
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Axis, Setting, Study
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, cautions, unfinished
from sinkgd.lab.report.figures import Chart, Figure, Identities, Identity, axis, layout
from sinkgd.lab.report.quantities import loss

RAW, BY_WIDTH, PINNED, DEFLATED = "raw", "by-width", "pinned", "sinkgd"
WIDTHS = {"llama-nano-64": 64, "llama-nano": 128, "llama-20m": 256}
PAPER_WIDTHS = {"llama-60m": 512, "llama-130m": 768, "llama-350m": 1024}

# Each grid has five rates, each twice the previous one. With a pinned operator norm, the largest
# singular value of a step is the rate times √(d_out/d_in), so PINNED_RATES are on another scale.
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
PINNED_RATES = (0.02, 0.04, 0.08, 0.16, 0.32)
_RANGE_ABOVE = 0.3  # nats that a chart shows above the highest of the grids' lowest losses
TOLERANCE = 0.05  # nats; a rate is good if its loss exceeds the grid's lowest by at most this


def rules(base_width: int) -> Mapping[str, Mapping[str, Any]]:
    """Return the options of every rule; "raw" and "by-width" agree at ``base_width``."""
    return {
        RAW: {},
        BY_WIDTH: {"optimizer.base_width": base_width},
        PINNED: {"optimizer.operator_norm": "muon"},
        DEFLATED: {"optimizer.recipe": "sinkgd"},
    }


def arms_at(presets: Mapping[str, int], lr: float) -> tuple[Arm, ...]:
    """Return one arm per rule and width, each with a grid of five rates."""
    base = min(presets.values())
    return tuple(
        Arm(
            f"{rule}-{width}",
            {"model.preset": preset, "optimizer.recipe": "sinkgd-paper", LR: lr, **options},
            {MATRIX_LR: PINNED_RATES if rule == PINNED else RATES},
            value=float(width),
            series=rule,
        )
        for rule, options in rules(base).items()
        for preset, width in presets.items()
    )


def adamws(preset: str, width: int, lr: float) -> tuple[Arm, ...]:
    """Return both AdamWs at one width, as controls."""
    grids: dict[str, Grid] = {
        "adamw": {LR: (lr,), MATRIX_LR: (0.0015, 0.003, 0.006, 0.012, 0.024)},
        "adamw-one-lr": {LR: (0.0015, 0.003, 0.006, 0.012, 0.024)},
    }
    return tuple(
        Arm(
            f"{recipe}-{width}",
            {"model.preset": preset, "optimizer.recipe": recipe},
            grid,
            value=float(width),
            control=True,
        )
        for recipe, grid in grids.items()
    )


def exponent(found: Sequence[tuple[float, float]]) -> float | None:
    """Fit p to pairs of d and rate, by least squares of the logarithms.

    Returns:
        The exponent p, or None if there are fewer than two widths.

    Examples:
        >>> exponent([(64, 0.004), (128, 0.002), (256, 0.001)])
        -1.0
    """
    if len({width for width, _ in found}) < 2:
        return None
    x = [math.log2(width) for width, _ in found]
    y = [math.log2(rate) for _, rate in found]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return round(covariance / sum((a - mean_x) ** 2 for a in x), 12)


def is_lower_bound(one: ArmResults) -> bool:
    """Whether the largest rate that was tried is good: higher ones may be good, too."""
    return good_up_to(one) == max(result.point[MATRIX_LR] for result in one.grid)


def is_upper_bound(one: ArmResults) -> bool:
    """Whether the smallest rate has the lowest loss: at lower ones the loss may be lower."""
    best = min(one.grid, key=lambda result: result.loss)
    return best.point[MATRIX_LR] == min(result.point[MATRIX_LR] for result in one.grid)


def good_up_to(one: ArmResults) -> float | None:
    """Return the largest good rate that was tried; None if no loss is finite."""
    losses = {result.point[MATRIX_LR]: result.loss for result in one.grid}
    lowest = min(losses.values(), default=math.inf)
    if not math.isfinite(lowest):
        return None
    return max(rate for rate, loss in losses.items() if loss <= lowest + TOLERANCE)


def _by_rule(results: StudyResults) -> dict[str, list[ArmResults]]:
    """Return the arms with results by rule, from the narrowest to the widest."""
    tuned = [one for one in results.candidates if good_up_to(one) is not None]
    return {
        rule: arms
        for rule in (RAW, BY_WIDTH, PINNED, DEFLATED)
        if (arms := [one for one in tuned if one.arm.series == rule])
    }


def judge(results: StudyResults) -> Verdict:
    """Name the rule whose largest good rate depends least on the width."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    found = _by_rule(results)
    fits = {
        rule: exponent([(one.arm.value or 0.0, good_up_to(one) or 0.0) for one in arms])
        for rule, arms in found.items()
        if not any(is_lower_bound(one) or is_upper_bound(one) for one in arms)
    }
    exponents = {rule: p for rule, p in fits.items() if p is not None}
    headline = "No rule has a fit: the largest good rate is not known at two widths or more"
    if exponents:
        least = min(abs(p) for p in exponents.values())
        stay = [rule for rule, p in exponents.items() if abs(p) == least]
        of_all = "Of the rules with a fit, the" if len(exponents) < len(found) else "The"
        headline = (
            f"{of_all} largest good rate depends least on the width with {' and '.join(stay)}: "
            f"lr ∝ d^{exponents[stay[0]]:.2f}"
        )
        if RAW in exponents and RAW not in stay:
            headline += f" (raw: d^{exponents[RAW]:.2f})"
    sentences = [_rates(rule, arms, exponents.get(rule)) for rule, arms in found.items()]
    sentences.append(
        f"A rate is good if its final loss is within {TOLERANCE:g} nats of the lowest in its grid; "
        "rates are a factor of two apart, with one run each. “At least” marks the largest rate of "
        "a grid: higher ones may be good, too. “At most” marks a width whose lowest loss is at the "
        "smallest rate: lower rates may lower it, and fewer may be good then. Neither allows a fit."
    )
    sentences += _at_the_largest(results)
    return Verdict(f"{headline}.", tuple(sentences), tuple(cautions(results)))


def charts(results: StudyResults, identities: Identities) -> list[Chart]:
    """Draw loss against rate at every width, one chart per rule."""
    return [
        _rate_chart(rule, arms, MATRIX_LR, identities) for rule, arms in _by_rule(results).items()
    ]


def _rate_chart(
    series: str, arms: Sequence[ArmResults], field: str, identities: Identities
) -> Chart:
    """Draw the final losses of grids against the learning rate, one line per arm.

    Args:
        series: The common name of the arms.
        arms: Arms with at least one point of the grid that did not diverge.
        field: Dotted name of the rate, e.g. ``"optimizer.matrix_lr"``.
        identities: Colors and markers of the arms.
    """
    curves = {one.arm.name: _losses_by_rate(one, field) for one in arms}
    lowest = [min(value for _, value in curve) for curve in curves.values()]
    words = [
        f"{name}: {', '.join(f'{rate:g} {loss(value)}' for rate, value in curve)}"
        for name, curve in curves.items()
    ]
    option, rates = field.rpartition(".")[2], sorted({r for v in curves.values() for r, _ in v})
    return Chart(
        key=f"loss-by-rate-{series}",
        title=f"Loss by rate: {series}",
        caption=f"Final loss of every point of the grid against {option}, one run each. Points "
        "far above the others are not shown.",
        description=f"{'; '.join(words)}.",
        figure={
            "data": [_rate_line(curve, identities[name]) for name, curve in curves.items()],
            "layout": layout(
                380,
                xaxis=axis(option, type="log", tickvals=rates, ticktext=[f"{r:g}" for r in rates]),
                yaxis=axis(
                    "nats per token", range=[min(lowest) - 0.02, max(lowest) + _RANGE_ABOVE]
                ),
                hovermode="closest",
            ),
        },
    )


def _losses_by_rate(one: ArmResults, field: str) -> list[tuple[float, float]]:
    """Return the rates and, for each, the lowest loss of its points."""
    lowest: dict[float, float] = {}
    for result in one.grid:
        if math.isfinite(result.loss):
            rate = result.point[field]
            lowest[rate] = min(result.loss, lowest.get(rate, math.inf))
    return sorted(lowest.items())


def _rate_line(curve: Sequence[tuple[float, float]], look: Identity) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": look.label,
        "x": [rate for rate, _ in curve],
        "y": [value for _, value in curve],
        "line": {"color": look.color, "width": 2.2},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 8},
        "hovertemplate": f"{look.label} at %{{x:g}}: %{{y:.3f}}<extra></extra>",
    }


def _rates(rule: str, arms: Sequence[ArmResults], p: float | None) -> str:
    good = ", ".join(f"{_good_rate(one)} at {one.arm.value:g}" for one in arms)
    best = ", ".join(f"{one.chosen[MATRIX_LR]:g}" for one in arms if one.chosen)
    fit = f": lr ∝ d^{p:.2f}" if p is not None else ""
    return f"{rule} is good up to {good}{fit}; best at {best}."


def _good_rate(one: ArmResults) -> str:
    """Return the largest good rate of an arm, or its bound."""
    bounds = (is_lower_bound(one), is_upper_bound(one))
    if all(bounds):
        return "an unknown rate"
    words = {(True, False): "at least ", (False, True): "at most "}.get(bounds, "")
    return f"{words}{good_up_to(one):g}"


def _at_the_largest(results: StudyResults) -> list[str]:
    largest = max((one.arm.value or 0.0) for one in results.candidates)
    ended = [
        f"{one.arm.series} {one.loss:.3f}"
        for one in results.candidates
        if one.arm.value == largest and one.loss is not None
    ]
    return [f"Final losses at {largest:g}: {', '.join(ended)}."]


_MACHINE = replace(MACHINE, training=replace(MACHINE.training, steps=120))

WIDTH = Study(
    name="width",
    question="Does the best rate of matrices depend on the width, and does a rule prevent that?",
    background="Axolotl reports that the best rate of raw SinkGD falls as 1/d_in, like Adam’s, and "
    "that pinning the operator norm to √(d_out/d_in) makes it independent of the width. Deflation, "
    "our default, bounds that norm in another way.",
    settings={
        "machine": Setting(_MACHINE, (*arms_at(WIDTHS, 0.08), *adamws("llama-nano", 128, 0.08))),
        "paper": Setting(
            BENCHMARK["llama-60m"], (*arms_at(PAPER_WIDTHS, 0.02), *adamws("llama-60m", 512, 0.02))
        ),
    },
    judge=judge,
    charts=charts,
    axis=Axis("width", "hidden size, d", log=True),
)
