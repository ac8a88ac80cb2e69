"""Charts that one question has and no other: of state, of rates, and of a recovery."""

import math
from collections.abc import Mapping, Sequence

from sinkgd.lab.experiments.charts import Identities, rows_figure, whiskers
from sinkgd.lab.experiments.results import ArmResults
from sinkgd.lab.report.charts import Chart, Figure, axis, layout
from sinkgd.lab.report.identity import Identity
from sinkgd.lab.report.quantities import loss, size

_MIB = 1024**2
_VALLEY = 0.3  # nats above the floors of valleys that are shown


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


def valley_chart(
    series: str, arms: Sequence[ArmResults], field: str, identities: Identities
) -> Chart:
    """Draw the final losses of a grid against its rate, a line an arm.

    Args:
        series: What the arms share.
        arms: With a tuned point at least.
        field: The option that was tuned.
        identities: How arms are recognized.
    """
    valleys = {one.arm.name: _valley(one, field) for one in arms}
    lowest = [min(value for _, value in valley) for valley in valleys.values()]
    words = [
        f"{name}: {', '.join(f'{rate:g} {loss(value)}' for rate, value in valley)}"
        for name, valley in valleys.items()
    ]
    option, rates = field.rpartition(".")[2], sorted({r for v in valleys.values() for r, _ in v})
    return Chart(
        key=f"valley-{series}",
        title=f"Loss by rate: {series}",
        caption=f"Final loss of every point of the grid against {option}, one run each. What ends "
        "far above is left out.",
        description=f"{'; '.join(words)}.",
        figure={
            "data": [_valley_line(valley, identities[name]) for name, valley in valleys.items()],
            "layout": layout(
                380,
                xaxis=axis(option, type="log", tickvals=rates, ticktext=[f"{r:g}" for r in rates]),
                yaxis=axis("nats per token", range=[min(lowest) - 0.02, max(lowest) + _VALLEY]),
                hovermode="closest",
            ),
        },
    )


def _valley(one: ArmResults, field: str) -> list[tuple[float, float]]:
    return sorted((r.point[field], r.loss) for r in one.grid if math.isfinite(r.loss))


def _valley_line(valley: Sequence[tuple[float, float]], look: Identity) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": look.label,
        "x": [rate for rate, _ in valley],
        "y": [value for _, value in valley],
        "line": {"color": look.color, "width": 2.2},
        "marker": {"color": look.color, "symbol": look.symbol, "size": 8},
        "hovertemplate": f"{look.label} at %{{x:g}}: %{{y:.3f}}<extra></extra>",
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
