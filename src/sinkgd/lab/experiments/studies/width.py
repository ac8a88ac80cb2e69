"""How the best rate of matrices moves with the width of the model, under four rules.

Letters:
    d: the hidden size
    p: the exponent of the best rate's dependence on it, lr ∝ d^p
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sinkgd.lab.experiments.charts import Identities
from sinkgd.lab.experiments.own_charts import best_rates_chart
from sinkgd.lab.experiments.results import ArmResults, StudyResults
from sinkgd.lab.experiments.studies.common import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Arm, Axis, Grid, Setting, Study
from sinkgd.lab.experiments.verdict import Verdict, cautions, unfinished
from sinkgd.lab.report.charts import Chart

RAW, BY_WIDTH, PINNED, DEFLATED = "raw", "by-width", "pinned", "deflated"
WIDTHS = {"llama-nano-64": 64, "llama-nano": 128, "llama-20m": 256}
PAPER_WIDTHS = {"llama-60m": 512, "llama-130m": 768, "llama-350m": 1024}

# Five rates, each twice the one before. A pinned rate counts in singular values.
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
PINNED_RATES = (0.02, 0.04, 0.08, 0.16, 0.32)


def rules(base_width: int) -> Mapping[str, Mapping[str, Any]]:
    """Return the options of every rule; raw and by width agree at ``base_width``."""
    return {
        RAW: {},
        BY_WIDTH: {"optimizer.base_width": base_width},
        PINNED: {"optimizer.operator_norm": "muon"},
        DEFLATED: {"optimizer.recipe": "deflated"},
    }


def arms_at(presets: Mapping[str, int], lr: float) -> tuple[Arm, ...]:
    """Return an arm for every rule and width, each with a grid of five rates."""
    base = min(presets.values())
    return tuple(
        Arm(
            f"{rule}-{width}",
            {"model.preset": preset, "optimizer.recipe": "sinkgd", LR: lr, **options},
            {MATRIX_LR: PINNED_RATES if rule == PINNED else RATES},
            value=float(width),
            series=rule,
        )
        for rule, options in rules(base).items()
        for preset, width in presets.items()
    )


def adamws(preset: str, width: int, lr: float) -> tuple[Arm, ...]:
    """Return both AdamWs at one width: where SinkGD stands, while rules are compared."""
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
    """Fit p to pairs of d and the best rate, by least squares of their logarithms.

    Returns:
        p, or None with fewer than two widths.

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


def _best_rates(results: StudyResults) -> dict[str, list[tuple[ArmResults, float, float]]]:
    """Return every rule's arms with the width and the best rate of each."""
    return {
        rule: [
            (one, one.arm.value or 0.0, one.chosen[MATRIX_LR])
            for one in results.candidates
            if one.arm.series == rule and one.chosen is not None
        ]
        for rule in (RAW, BY_WIDTH, PINNED, DEFLATED)
    }


def _exponents(found: Mapping[str, Sequence[tuple[ArmResults, float, float]]]) -> dict[str, float]:
    fits = {
        rule: exponent([(width, rate) for _, width, rate in line]) for rule, line in found.items()
    }
    return {rule: p for rule, p in fits.items() if p is not None}


def judge(results: StudyResults) -> Verdict:
    """Say for which rule the best rate stays, and which rule ends lowest at the largest width."""
    if (nothing := unfinished(results)) is not None:
        return nothing
    found = _best_rates(results)
    exponents = _exponents(found)
    if not exponents:
        return Verdict("No rule has a best rate at two widths yet.", (), tuple(cautions(results)))
    stays = min(exponents, key=lambda rule: abs(exponents[rule]))
    headline = (
        f"The best rate depends least on the width with {stays}: lr ∝ d^{exponents[stays]:.2f}"
    )
    if RAW in exponents and stays != RAW:
        headline += f", raw with d^{exponents[RAW]:.2f}"
    sentences = [_rates(rule, line, exponents) for rule, line in found.items() if line]
    sentences += _at_the_largest(results)
    return Verdict(f"{headline}.", tuple(sentences), tuple(cautions(results)))


def chart(results: StudyResults, identities: Identities) -> Chart | None:
    """Draw the best rates by width; None before a grid has ended."""
    found = _best_rates(results)
    if not any(found.values()):
        return None
    return best_rates_chart(found, _exponents(found), identities)


def _rates(
    rule: str, line: Sequence[tuple[ArmResults, float, float]], exponents: Mapping[str, float]
) -> str:
    words = ", ".join(f"{rate:g} at {width:g}" for _, width, rate in line)
    fit = f": lr ∝ d^{exponents[rule]:.2f}" if rule in exponents else ""
    return f"Best rates of {rule}: {words}{fit}. Rates are a factor of two apart."


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
    question="Does the best rate of matrices move with the width, and does a rule stop it?",
    background="Axolotl reports that raw SinkGD’s best rate falls as 1/d_in, as Adam’s does, and "
    "that pinning the operator norm to √(d_out/d_in) makes it independent of the width. Deflation "
    "bounds that norm in its own way, and is our default.",
    settings={
        "machine": Setting(_MACHINE, (*arms_at(WIDTHS, 0.08), *adamws("llama-nano", 128, 0.08))),
        "paper": Setting(
            BENCHMARK["llama-60m"], (*arms_at(PAPER_WIDTHS, 0.02), *adamws("llama-60m", 512, 0.02))
        ),
    },
    judge=judge,
    chart=chart,
    axis=Axis("width", "hidden size, d", log=True),
)
