"""Write the verdict and the page of a record of `directions`.

python benchmarks/directions/directions_report.py RECORD.jsonl FOLDER
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.experiments.study_report import as_markdown
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart, Figure, axis, layout
from sinkgd.lab.report.measurement_page import (
    PageContent,
    environment_table,
    measurement_page,
)
from sinkgd.lab.report.quantities import percent
from sinkgd.lab.report.shell import from_cdn
from sinkgd.optim.param_groups import DEFLATED_RANK

QUESTION = "Why does deflation help?"
COMMAND = "python benchmarks/directions/directions.py RECORD.jsonl eltec-2048"
PARTS = {"taken": "what deflation takes away", "rest": "the rest", "update": "both together"}
SYMBOLS = {"taken": "circle", "rest": "diamond", "update": "square"}

Line = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """A model at one step."""

    preset: str
    step: int
    matrices: Sequence[Line]
    model: Line

    @property
    def width(self) -> int:
        """The hidden size: the smaller side of every matrix."""
        sides: list[int] = [min(line["shape"]) for line in self.matrices]
        return min(sides)

    def median(self, of: Callable[[Line], float]) -> float:
        """Return the median over matrices."""
        return statistics.median(of(line) for line in self.matrices)

    def cosine(self, name: str) -> float:
        """Return the median cosine of a matrix with the gradient of many batches."""
        return self.median(lambda line: float(line["cosines"][name]))

    def changes(self, part: str) -> dict[float, float]:
        """Return the change of the loss along a part, for each length of the step."""
        before = self.model["losses"]["before"]
        found = zip(self.model["lengths"], self.model["losses"][part], strict=True)
        return {length: loss - before for length, loss in found}

    def best(self, part: str) -> float:
        """Return the length with the lowest loss, 0 if every step raises it."""
        changes = self.changes(part)
        length = min(changes, key=changes.__getitem__)
        return length if changes[length] < 0 else 0.0


def looks_of(lines: Sequence[Line]) -> list[Look]:
    """Return the looks of the presets whose runs are complete in the record."""
    whole = [line["preset"] for line in lines if line["kind"] == "end"]
    found = []
    for model in (line for line in lines if line["kind"] == "model" and line["preset"] in whole):
        matrices = [
            line
            for line in lines
            if line["kind"] == "matrix"
            and (line["preset"], line["step"]) == (model["preset"], model["step"])
        ]
        found.append(Look(model["preset"], model["step"], matrices, model))
    return found


def edge(line: Line) -> float:
    """Return about the largest singular value of a matrix of independent entries of variance 1."""
    m, n = line["shape"]
    return math.sqrt(m) + math.sqrt(n)


def outstanding(line: Line) -> int:
    """Return how many singular values of the update are above the edge."""
    values: list[float] = line["update"]
    return sum(value > edge(line) for value in values)


def leading_share(line: Line) -> float:
    """Return the leading directions' share of the squared norm of the update."""
    squares: list[float] = [value * value for value in line["update"]]
    return sum(squares[:DEFLATED_RANK]) / sum(squares)


def signal_share(line: Line, chosen: slice) -> float:
    """Return the share of the gradient along some directions that is not noise."""
    signal: list[float] = line["along signal"][chosen]
    gradient: list[float] = line["along gradient"][chosen]
    return sum(signal) / sum(gradient)


LEADING, OTHERS = slice(DEFLATED_RANK), slice(DEFLATED_RANK, None)


def directions_table(looks: Sequence[Look]) -> TextTable:
    """Make the table of directions."""
    return TextTable(
        title="Directions",
        note="Medians over the hidden matrices of a model. Outstanding: singular values of X above "
        f"√m + √n, and the most in any matrix. Leading: the {DEFLATED_RANK} that deflation "
        "lowers. Signal: the share of the gradient along these directions that the gradient of 64 "
        "other batches has, too. Cosines are with that gradient.",
        columns=(
            *("model", "width", "step", "outstanding", "most", "leading, share of ‖X‖²"),
            *("signal, leading", "signal, others", "cosine of G", "of X", "of D"),
        ),
        rows=tuple(
            (
                look.preset,
                str(look.width),
                str(look.step),
                f"{look.median(outstanding):g}",
                str(max(map(outstanding, look.matrices))),
                percent(look.median(leading_share)),
                percent(look.median(lambda line: signal_share(line, LEADING))),
                percent(look.median(lambda line: signal_share(line, OTHERS))),
                *(f"{look.cosine(name):.2f}" for name in ("gradient", "update", "deflated")),
            )
            for look in looks
        ),
    )


def lengths_table(looks: Sequence[Look]) -> TextTable:
    """Make the table of how far each part can be followed."""
    return TextTable(
        title="How far each part can be followed",
        note="The change of the loss on other batches after a step along what deflation takes away "
        "(X − D), along the rest (D), and along both (X), each of root-mean-square 1, by the run's "
        "present rate (1), and the best length of those that were tried, in rates.",
        columns=(
            *("model", "step", "rate", "X − D: change at 1", "best length"),
            *("D: change at 1", "best length", "X: change at 1", "best length"),
        ),
        rows=tuple(
            (
                look.preset,
                str(look.step),
                f"{look.model['rate']:.2g}",
                *(
                    cell
                    for part in PARTS
                    for cell in (f"{look.changes(part)[1.0]:+.3f}", f"{look.best(part):g}")
                ),
            )
            for look in looks
        ),
    )


def verdict_of(looks: Sequence[Look]) -> Verdict:
    """Say what the record shows."""
    late = [look for look in looks if look.step > looks[0].step]
    raised = [look for look in late if look.changes("taken")[1.0] > 0]
    lowered = [look for look in late if look.changes("rest")[1.0] < 0]
    shorter = [look for look in late if look.best("taken") < look.best("rest")]
    most_by_width = {
        width: max(max(map(outstanding, look.matrices)) for look in looks if look.width == width)
        for width in sorted({look.width for look in looks})
    }
    counts = ", ".join(f"{count} at width {width}" for width, count in most_by_width.items())
    per_width = [count / width for width, count in most_by_width.items()]
    shares = [look.median(leading_share) for look in late]
    leading = [look.median(lambda line: signal_share(line, LEADING)) for look in late]
    others = [look.median(lambda line: signal_share(line, OTHERS)) for look in late]
    return Verdict(
        f"In {len(shorter)} of {len(late)} looks after the first, the part that deflation takes "
        "away can be followed less far than the rest.",
        (
            f"A step of the run's rate along that part alone raises the loss in {len(raised)} of "
            f"{len(late)} looks, and one along the rest lowers it in {len(lowered)}.",
            f"That part is no noise: of the gradient along the {DEFLATED_RANK} leading directions "
            f"{percent(min(leading))} to {percent(max(leading))} is signal, along the others "
            f"{percent(min(others))} to {percent(max(others))}. It holds {percent(min(shares))} to "
            f"{percent(max(shares))} of the squared norm of an update.",
            "The number of directions that stand out from independent entries grows with the "
            f"width: at most {counts}. This is {min(per_width):.2f} to {max(per_width):.2f} of the "
            "width.",
        ),
        (
            "One seed of small models. Steps were taken from the weights of the run, whose own "
            "steps are deflated: along a run without deflation the figures may differ.",
        ),
    )


def lengths_chart(looks: Sequence[Look]) -> Chart:
    """Draw the loss along each part, for the widest model at a middle step."""
    look = middle(looks)
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": PARTS[part],
            "x": list(look.changes(part)),
            "y": list(look.changes(part).values()),
            "line": {"color": f"@series-{place + 1}", "width": 2},
            "marker": {
                "color": f"@series-{place + 1}",
                "symbol": SYMBOLS[part],
                "size": 8,
            },
            "hovertemplate": f"{PARTS[part]}: %{{y:+.3f}}<extra></extra>",
        }
        for place, part in enumerate(PARTS)
    ]
    lowest = min(min(look.changes(part).values()) for part in PARTS)
    return Chart(
        key="lengths",
        title="How far each part can be followed",
        caption=f"Change of the loss on other batches, {look.preset}, step {look.step}, after a "
        "step along a part of the update of all hidden matrices.",
        description="; ".join(f"along {PARTS[p]} best at {look.best(p):g} rates" for p in PARTS),
        figure={
            "data": data,
            "layout": layout(
                440,
                xaxis=axis("length of the step / rate of the run", type="log"),
                yaxis=axis("change of the loss", range=[1.5 * lowest, -2.0 * lowest]),
            ),
        },
        share=1,
    )


def values_chart(looks: Sequence[Look]) -> Chart:
    """Draw the singular values of a matrix in the same look."""
    look = middle(looks)
    line = look.matrices[len(look.matrices) // 2]
    names = {"gradient": "gradient", "update": "after SR-Sinkhorn", "deflated": "after deflation"}
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": list(range(1, len(line[key]) + 1)),
            "y": [value / edge(line) for value in line[key]],
            "line": {"color": f"@series-{place + 1}", "width": 2},
            "hovertemplate": f"{name}: %{{y:.2f}}<extra></extra>",
        }
        for place, (key, name) in enumerate(names.items())
    ]
    return Chart(
        key="values",
        title="Singular values",
        caption=f"Of {line['matrix']} in {look.preset}, step {look.step}, relative to √m + √n, "
        "above which independent entries have none.",
        description=f"{outstanding(line)} singular values of the update are above √m + √n.",
        figure={
            "data": data,
            "layout": layout(
                440,
                xaxis=axis("singular value, by size", type="log"),
                yaxis=axis("size / (√m + √n)", type="log", range=[-2, 1]),
            ),
        },
        share=1,
    )


def middle(looks: Sequence[Look]) -> Look:
    """Return the middle look at the widest model."""
    widest = max(look.width for look in looks)
    own = [look for look in looks if look.width == widest]
    return own[len(own) // 2]


def main() -> None:
    """Write ``verdict.md`` and ``report.html``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.record.read_text(encoding="utf-8").splitlines()]
    looks = looks_of(lines)
    verdict, tables = verdict_of(looks), [directions_table(looks), lengths_table(looks)]
    given.folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(QUESTION, verdict, tables, COMMAND)
    (given.folder / "verdict.md").write_text(text, encoding="utf-8")
    page = measurement_page(
        PageContent(
            headline=verdict.headline,
            footer="One run for each model; nothing is averaged over seeds.",
            charts=[lengths_chart(looks), values_chart(looks)],
            tables=tables,
            answers=verdict.sentences,
            cautions=verdict.cautions,
        ),
        title=QUESTION,
        environment=environment_table(lines[0]["environment"]),
        command=COMMAND,
    )
    (given.folder / "report.html").write_text(from_cdn(page), encoding="utf-8")


if __name__ == "__main__":
    main()
