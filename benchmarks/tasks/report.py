"""Write the verdict and the page of a record of `rewards` or `instructions`.

Verdict and page give, for each optimizer, the chosen rate, the result of every seed, and the
difference from AdamW with its 95 % interval over paired seeds.

    python benchmarks/tasks/report.py rewards RECORD.jsonl FOLDER
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import instructions
import rewards
from tuned_runs import SEEDS, TUNING_SEED, Line, read

from sinkgd.lab.experiments.study_report import as_markdown
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.difference import Difference
from sinkgd.lab.report.figures import Chart, Figure, axis, layout
from sinkgd.lab.report.measurement_page import (
    PageContent,
    environment_table,
    measurement_page,
)
from sinkgd.lab.report.shell import from_cdn

CONTROL = "adamw"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon")


@dataclass(frozen=True)
class Subject:
    """What a script measured."""

    question: str
    about: str  # the setting, in a sentence
    result: str  # what is counted
    of: Callable[[Line], float]  # the result of a run, a share
    curve: Callable[[Line], Mapping[str, float]]  # the same by step
    score: Callable[[Line], float]  # by which rates were chosen
    others: Mapping[str, Callable[[Line], float]]  # further figures of a run
    command: str
    deflation: str = ""  # what is said of lowering the leading directions of updates, if anything


SUBJECTS = {
    "rewards": Subject(
        question="Does SinkGD learn from verifiable rewards as well as AdamW?",
        about="A LLaMA of 201k hidden weights, which examples had taught a third of the sums of "
        "two numbers below 100, practiced 9,600 sums with rewards alone.",
        result="held-out sums answered",
        of=rewards.final,
        curve=lambda line: line["accuracy"],
        score=rewards.final,
        others={
            "divergence from the first policy, nats an answer": lambda line: float(
                line["divergence from the first policy"]
            )
        },
        command="python benchmarks/tasks/rewards.py RECORD.jsonl",
        deflation="Fan et al. (arXiv:2605.19282) report that whitening, which raises the other "
        "directions of an update to the leading ones, makes such training unstable. Deflation goes "
        "half that way:",
    ),
    "instructions": Subject(
        question="Does SinkGD fine-tune a model on instructions as well as AdamW?",
        about="A GPT-2 of 1.1M weights, trained on novels, learned six kinds of instructions about "
        "words from 6,400 examples.",
        result="new instructions answered exactly",
        of=lambda line: float(list(line["exact"].values())[-1]),
        curve=lambda line: line["exact"],
        score=instructions.score,
        others={
            "loss of the answers, nats per token": lambda line: float(line["answer loss"]),
            "rise of the loss on novels": lambda line: float(
                list(line["text loss"].values())[-1] - line["text loss"]["0"]
            ),
        },
        command="python benchmarks/tasks/instructions.py runs/gpt2-by-adamw eltec-2048 "
        "RECORD.jsonl",
    ),
}


@dataclass(frozen=True)
class Arm:
    """The runs of one optimizer."""

    name: str
    grid: Sequence[Line]
    seeds: Sequence[Line]

    def results(self, subject: Subject) -> dict[int, float]:
        """Return the result of every seed."""
        return {line["seed"]: subject.of(line) for line in self.seeds}

    def mean(self, subject: Subject) -> float:
        """Return the mean result."""
        return statistics.fmean(self.results(subject).values())


def arms_of(lines: Sequence[Line], subject: Subject) -> list[Arm]:
    """Return the arms of a record, the best result first.

    Raises:
        SystemExit: If an arm lacks a seed.
    """
    found = []
    for name in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == name]
        grid = sorted((x for x in own if x["seed"] == TUNING_SEED), key=lambda x: float(x["rate"]))
        best = max(grid, key=subject.score)["rate"]
        seeds = [x for x in own if x["seed"] in SEEDS and x["rate"] == best]
        if len(seeds) < len(SEEDS):
            raise SystemExit(f"{name} has {len(seeds)} of {len(SEEDS)} seeds; run the script again")
        found.append(Arm(name, grid, sorted(seeds, key=lambda x: int(x["seed"]))))
    return sorted(found, key=lambda arm: -arm.mean(subject))


def points(value: float) -> str:
    """Format a share as percent.

    >>> points(0.5313)
    '53.1'
    """
    return f"{100 * value:.1f}"


def in_points(found: Difference) -> str:
    """Format a difference of shares.

    >>> in_points(Difference(0.021, 0.034, 3))
    '+2.1 ± 3.4'
    """
    return f"{100 * found.mean:+.1f} ± {100 * found.half_width:.1f}"


def compared(arm: Arm, control: Arm, subject: Subject) -> str:
    """Compare an arm with the control in a sentence."""
    found = Difference.of(arm.results(subject), control.results(subject))
    ends = f"{arm.name} answers {points(arm.mean(subject))} % and {control.name} "
    ends += f"{points(control.mean(subject))} %"
    if found.level:
        return f"{ends}, which is level: the difference is {in_points(found)} points."
    if found.unknown:
        return f"{ends}; one seed cannot tell the two apart."
    size = f"{100 * abs(found.mean):.1f} ± {100 * found.half_width:.1f}"
    return f"{ends}: {size} points {'fewer' if found.lower else 'more'}."


def table_of(arms: Sequence[Arm], subject: Subject) -> TextTable:
    """Make the table of the arms."""
    (control,) = (arm for arm in arms if arm.name == CONTROL)
    rows = []
    for arm in arms:
        results = arm.results(subject)
        against = Difference.of(results, control.results(subject))
        rows.append(
            (
                arm.name,
                f"{arm.seeds[0]['rate']:g}",
                points(arm.mean(subject)),
                ", ".join(points(value) for value in results.values()),
                "" if arm is control else in_points(against),
                *(
                    f"{statistics.fmean(of(line) for line in arm.seeds):.3f}"
                    for of in subject.others.values()
                ),
            )
        )
    return TextTable(
        title="Arms",
        note=f"Percent of {subject.result}, with the best rate of each grid: the mean, every seed, "
        "and the difference from AdamW in points with its 95 % interval over paired seeds.",
        columns=("arm", "rate", "percent", "by seed", f"from {CONTROL}", *subject.others),
        rows=tuple(rows),
    )


def grid_table(arms: Sequence[Arm], subject: Subject) -> TextTable:
    """Make the table of every rate that was tried."""
    return TextTable(
        title="Every rate that was tried",
        note=f"One run each, with seed {TUNING_SEED}, which no reported run has.",
        columns=("arm", "rate: percent"),
        rows=tuple(
            (arm.name, ", ".join(f"{x['rate']:g}: {points(subject.of(x))}" for x in arm.grid))
            for arm in arms
        ),
    )


def verdict_of(arms: Sequence[Arm], subject: Subject) -> Verdict:
    """Compare every arm with AdamW in words."""
    (control,) = (arm for arm in arms if arm.name == CONTROL)
    words = {arm.name: compared(arm, control, subject) for arm in arms if arm is not control}
    by_name = {arm.name: arm for arm in arms}
    ours = by_name["sinkgd"]
    rest = [sentence for name, sentence in words.items() if name != ours.name]
    if subject.deflation and (plain := by_name.get("sinkgd-plain")) is not None:
        rest.insert(0, f"{subject.deflation} {compared(ours, plain, subject)}")
    cautions = (
        "One tiny model, one task and three seeds: it shows a direction, and nothing about large "
        "models.",
    )
    return Verdict(words[ours.name], (subject.about, *rest), cautions)


def curves(arms: Sequence[Arm], subject: Subject) -> Chart:
    """Draw the mean result of each arm by step."""
    data: list[Figure] = []
    for place, arm in enumerate(arms):
        steps = [int(step) for step in subject.curve(arm.seeds[0])]
        means = [
            statistics.fmean(subject.curve(line)[str(step)] for line in arm.seeds) for step in steps
        ]
        data.append(_line(arm.name, place, steps, means))
    ends = [f"{arm.name} {points(arm.mean(subject))} %" for arm in arms]
    return Chart(
        key="curves",
        title="During training",
        caption=f"Share of {subject.result}, mean over seeds.",
        description=f"At the end: {', '.join(ends)}.",
        figure={
            "data": data,
            "layout": layout(
                440,
                xaxis=axis("steps"),
                yaxis=axis(subject.result, tickformat=".0%", rangemode="tozero"),
            ),
        },
        share=1,
    )


def rates(arms: Sequence[Arm], subject: Subject) -> Chart:
    """Draw the result of each arm by its rate relative to the chosen one."""
    data = [
        _line(
            arm.name,
            place,
            [float(x["rate"]) / float(arm.seeds[0]["rate"]) for x in arm.grid],
            [subject.of(x) for x in arm.grid],
        )
        for place, arm in enumerate(arms)
    ]
    return Chart(
        key="rates",
        title="How much the rate matters",
        caption=f"Share of {subject.result} by the rate, relative to the chosen one; one run each.",
        description="The table of rates has the same numbers.",
        figure={
            "data": data,
            "layout": layout(
                440,
                xaxis=axis("rate / chosen rate", type="log"),
                yaxis=axis(subject.result, tickformat=".0%", rangemode="tozero"),
            ),
        },
        share=1,
    )


def _line(name: str, place: int, x: Sequence[float], y: Sequence[float]) -> Figure:
    color = f"@series-{place + 1}"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "symbol": SYMBOLS[place], "size": 8},
        "hovertemplate": f"{name}: %{{y:.1%}}<extra></extra>",
    }


def main() -> None:
    """Write ``verdict.md`` and ``report.html``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    subject, lines = SUBJECTS[given.subject], read(given.record)
    arms = arms_of(lines, subject)
    verdict = verdict_of(arms, subject)
    table, grid = table_of(arms, subject), grid_table(arms, subject)
    given.folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(subject.question, verdict, [table, grid], subject.command)
    (given.folder / "verdict.md").write_text(text, encoding="utf-8")
    page = measurement_page(
        PageContent(
            headline=verdict.headline,
            footer="Arms differ if the 95 % interval of their difference over paired seeds "
            "excludes zero; otherwise they are level.",
            charts=[curves(arms, subject), rates(arms, subject)],
            tables=[table, grid],
            answers=verdict.sentences,
            cautions=verdict.cautions,
        ),
        title=subject.question,
        environment=environment_table(lines[-1]["environment"]),
        command=subject.command,
    )
    (given.folder / "report.html").write_text(from_cdn(page), encoding="utf-8")


if __name__ == "__main__":
    main()
