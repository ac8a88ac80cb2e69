"""Charts that one question has and no other: of state, of best rates, and of a recovery."""

import html
import math
from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.charts import Identities, rows_figure, whiskers
from sinkgd.lab.experiments.results import ArmResults
from sinkgd.lab.report.charts import Chart, Figure, axis, layout
from sinkgd.lab.report.quantities import loss, size

_MIB = 1024**2


def state_chart(
    arms: Sequence[ArmResults],
    kept: Mapping[str, int],
    front: Sequence[ArmResults],
    identities: Identities,
) -> Chart:
    """Draw the final loss of every arm against what its optimizer keeps, and the front.

    Args:
        arms: With seeds, none diverged.
        kept: Bytes of state, by arm.
        front: Those that none beats in both, from the least state to the most.
        identities: How arms are recognized.
    """
    words = [f"{one.arm.name} {size(kept[one.arm.name])}, {loss(one.loss or 0)}" for one in arms]
    names = ", ".join(one.arm.name for one in front)
    return Chart(
        key="state-loss",
        title="State against final loss",
        caption="What the optimizer keeps between steps, and the validation loss at the end, mean "
        "and range over seeds. Lower and further left is better; the line is the front.",
        description=f"{'; '.join(words)}. On the front: {names}.",
        figure={
            "data": [
                _front_line(front, kept),
                *(_place(one, kept[one.arm.name], identities) for one in arms),
            ],
            "layout": layout(
                460,
                xaxis=axis("MiB of optimizer state", rangemode="tozero"),
                yaxis=axis("nats per token"),
                hovermode="closest",
            ),
        },
        share=1,
    )


def _front_line(front: Sequence[ArmResults], kept: Mapping[str, int]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [kept[one.arm.name] / _MIB for one in front],
        "y": [one.loss for one in front],
        "line": {"color": "@soft", "width": 1.4, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _place(one: ArmResults, kept: int, identities: Identities) -> Figure:
    look, ends = identities[one.arm.name], list(one.losses.values())
    return {
        "type": "scatter",
        "mode": "markers",
        "name": look.label,
        "x": [kept / _MIB],
        "y": [one.loss],
        "marker": {"color": look.color, "symbol": look.symbol, "size": 12},
        "error_y": whiskers([one.loss], [(min(ends), max(ends))], look),
        "cliponaxis": False,
        "hovertemplate": f"{look.label}<br>{size(kept)}<br>{loss(one.loss or 0)}<extra></extra>",
    }


def best_rates_chart(
    found: Mapping[str, Sequence[tuple[ArmResults, float, float]]],
    exponents: Mapping[str, float],
    identities: Identities,
) -> Chart:
    """Draw the best rate against the width, a line a rule, both by factors of two.

    Args:
        found: By rule, its arms with the width and the best rate of each.
        exponents: p of lr ∝ d^p, by rule, where there are two widths.
        identities: How arms are recognized.
    """
    fits = [f"{rule} d^{p:.2f}" for rule, p in exponents.items()]
    widths = sorted({width for line in found.values() for _, width, _ in line})
    return Chart(
        key="best-rates",
        title="Best rate of matrices by width",
        caption="The rate whose run ended lowest, of five that lie a factor of two apart. A level "
        "line is a rate that carries over from a small model to a large one.",
        description=f"The best rate follows {', '.join(fits) or 'nothing yet'}.",
        figure={
            "data": [_rates_line(rule, line, identities) for rule, line in found.items() if line],
            "layout": layout(
                400,
                xaxis=axis(
                    "hidden size, d",
                    type="log",
                    tickvals=widths,
                    ticktext=[f"{width:g}" for width in widths],
                    range=[math.log10(widths[0]) - 0.12, math.log10(widths[-1]) + 0.12],
                ),
                yaxis=axis("best rate", type="log", dtick=math.log10(2), tickformat="~g"),
                hovermode="closest",
            ),
        },
        share=1,
    )


def _rates_line(
    rule: str, line: Sequence[tuple[ArmResults, float, float]], identities: Identities
) -> Figure:
    look = identities[line[0][0].arm.name]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(rule),
        "x": [width for _, width, _ in line],
        "y": [rate for _, _, rate in line],
        "line": {"color": look.color, "width": 2.4},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 11},
        "hovertemplate": f"{html.escape(rule)} at %{{x:g}}: %{{y:g}}<extra></extra>",
    }


def recovery_chart(
    rows: Sequence[tuple[str, Sequence[float], str]], identities: Identities
) -> Chart:
    """Draw how many tokens each arm needed after a change, an arm a row.

    Args:
        rows: Names of arms, the tokens of every seed that came back, and what to say of them.
        identities: How arms are recognized.
    """
    along = axis("tokens after the change", rangemode="tozero", tickformat="~s", fixedrange=True)
    return Chart(
        key="recovery",
        title="Tokens until the loss is back",
        caption="From the change of vocabulary to where the validation loss is back at the last "
        "value before it: every seed that came back, and their mean with its range.",
        description=f"{'; '.join(f'{name}: {words}' for name, _, words in rows)}.",
        figure=rows_figure(rows, along, identities),
        share=1,
    )
