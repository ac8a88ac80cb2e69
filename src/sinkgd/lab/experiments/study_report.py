"""The report of a study: its tables, its verdict as Markdown, and its page in one HTML file."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkgd.lab.experiments.arms import point_words
from sinkgd.lab.experiments.studies import scale
from sinkgd.lab.experiments.studies.scale import Fit, fits_table
from sinkgd.lab.experiments.study import Study
from sinkgd.lab.experiments.study_charts import final_chart, grid_chart
from sinkgd.lab.experiments.study_record import StudyRecord
from sinkgd.lab.experiments.study_results import ArmResults, StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.report import calculator_block, published_block
from sinkgd.lab.report.analysis import Analysis, Spread, preset_of, summarize
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart, identify
from sinkgd.lab.report.page import measured_charts
from sinkgd.lab.report.quantities import ABSENT, count, duration, loss, percent, size
from sinkgd.lab.report.shell import render
from sinkgd.lab.report.token_share import MeanShare, token_share

VERDICT_FILE = "verdict.md"  # in the study's folder
_TEMPLATE = Path(__file__).parent / "study.html"


def arms_table(results: StudyResults) -> TextTable:
    """Make the table of arms: losses at the end and at equal seconds, speed, memory."""
    seconds = results.equal_seconds
    after = f"loss after {duration(seconds)}" if seconds else "loss at equal seconds"
    return TextTable(
        title="Arms",
        note="Losses are validation losses in nats per token, ± half the range over seeds. Equal "
        "seconds are those of the fastest arm, if times can be compared; the schedules of slower "
        "arms were not over by then. "
        "The tables on reaching a control’s final loss give the effective tokens per second.",
        columns=(
            "arm",
            "seeds",
            "final loss",
            after,
            "tokens",
            "training",
            "step",
            "optimizer",
            "tokens/s",
            "state",
        ),
        rows=tuple(_arm_row(results, one, seconds) for one in results.ranked),
    )


def short_table(results: StudyResults) -> TextTable:
    """Make the table of arms with the columns that fit a terminal."""
    whole = arms_table(results)
    kept = (0, 1, 2, 3, 6, 9)
    return TextTable(
        title=whole.title,
        note="± half the range over seeds; losses in nats per token.",
        columns=tuple(whole.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in whole.rows),
    )


def _arm_row(results: StudyResults, one: ArmResults, seconds: float | None) -> tuple[str, ...]:
    summary = summarize(one.arm.name, [result.run for result in one.seeds])
    at_seconds = results.loss_after(one, seconds) if seconds else None

    def mean(spread: Spread | None, write: object = count) -> str:
        assert callable(write)
        return str(write(spread.mean)) if spread else ABSENT

    diverged = f" ({one.diverged} diverged)" if one.diverged else ""
    return (
        f"{one.arm.name} (control)" if one.arm.control else one.arm.name,
        f"{len(one.seeds)}{diverged}",
        summary.val_loss.with_range(digits=3) if summary.val_loss else ABSENT,
        at_seconds.with_range(digits=3) if at_seconds else ABSENT,
        mean(summary.tokens),
        mean(summary.seconds, duration),
        mean(summary.step_seconds, duration),
        mean(summary.optimizer_share, percent),
        mean(summary.tokens_per_second),
        size(summary.memory.state_bytes) if summary.memory else ABSENT,
    )


def reach_tables(results: StudyResults) -> list[TextTable]:
    """Make a table for each control that did not diverge: the others' cost to reach its loss.

    Arms with another model are not compared with it.
    """
    tables = [
        _reach_table(results, control) for control in results.controls if not control.diverged
    ]
    return [table for table in tables if table.rows]


def _reach_table(results: StudyResults, control: ArmResults) -> TextTable:
    name = control.arm.name
    analysis = results.analysis(name)
    model, timed = _model(control), results.times_comparable
    alike = {one.arm.name for one in results.arms if one.seeds and _model(one) == model}
    rows = []
    for recipe in analysis.recipes:
        comparison = analysis.comparisons.get(recipe.name)
        if comparison is None or recipe.name == name or recipe.name not in alike:
            continue
        paired = _paired_share(results, recipe.name, control)
        if comparison.tokens is None or comparison.seconds is None:
            shortfall = comparison.shortfall or ABSENT
            rows.append((recipe.name, shortfall, ABSENT, paired, *([ABSENT] * 3)))
            continue
        fraction, time = comparison.token_fraction, comparison.time_fraction
        effective = comparison.effective_tokens_per_second
        rows.append(
            (
                recipe.name,
                count(comparison.tokens.mean),
                percent(fraction.mean) if fraction else ABSENT,
                paired,
                duration(comparison.seconds.mean) if timed else ABSENT,
                percent(time.mean) if time and timed else ABSENT,
                count(effective.mean) if effective and timed else ABSENT,
            )
        )
    target = ABSENT if analysis.target is None else loss(analysis.target)
    return TextTable(
        title=f"To reach {name}’s final loss, {target}",
        note=f"Means over all seeds, if all reached this loss, which is {name}’s mean. Percentages "
        f"are relative to the whole run of {name}. Seed by seed: the tokens that a run needs for "
        f"the final loss of {name} with the same seed, as a geometric mean with its 95 % interval; "
        f"if a run ends higher, the inverse of the share with which {name} reaches its loss. "
        "Losses are those during training, when the schedule was not over yet. "
        f"Effective: all tokens of {name}, divided by the seconds that an arm needs to reach this "
        "loss.",
        columns=(
            *("arm", "tokens", "of all", "seed by seed"),
            *("time", "of all", "effective tokens/s"),
        ),
        rows=tuple(rows),
    )


def _paired_share(results: StudyResults, arm: str, control: ArmResults) -> str:
    """Return the share of the control's tokens that an arm needs, over the seeds of both."""
    one = results.arm(arm)
    others = {result.seed: result.run for result in control.seeds}
    own = [(r.run, others[r.seed]) for r in (one.seeds if one else ()) if r.seed in others]
    share = MeanShare.of([token_share(run, other) for run, other in own])
    return ABSENT if share is None else str(share)


def grid_table(results: StudyResults) -> TextTable:
    """Make the table of every point of the grids."""
    rows = []
    for one in results.ranked:
        for result in sorted(one.grid, key=lambda r: list(r.point.values())):
            chosen = result.point == one.chosen
            words = loss(result.loss) if math.isfinite(result.loss) else "diverged"
            point = point_words(result.point)
            rows.append((one.arm.name, point, words, "chosen" if chosen else ""))
    return TextTable(
        title="Every point of the grids",
        note=f"One run each, with seed {results.plan['tuning_seed']}, which no reported run has.",
        columns=("arm", "point", "loss", ""),
        rows=tuple(rows),
    )


def sessions_table(record: StudyRecord) -> TextTable:
    """Make the table of sessions: the wall time of each, and its overhead outside of runs."""
    return TextTable(
        title="Sessions",
        note="Overhead: time of jobs outside of runs, as a share of the time of runs. Time in "
        f"which a job had no work while others ran is not counted.{_reuse_note(record)}",
        columns=("session", "jobs", "runs", "wall time", "runs, sum", "overhead"),
        rows=tuple(
            (
                str(i),
                str(one.jobs),
                str(one.runs),
                duration(one.wall_seconds),
                duration(one.runs_wall_seconds),
                ABSENT if one.overhead is None else f"{100 * one.overhead:.1f} %",
            )
            for i, one in enumerate(record.sessions, start=1)
        ),
    )


def _reuse_note(record: StudyRecord) -> str:
    """Say how many runs come from which other studies; empty if none do."""
    counts = Counter(result.study for result in record.runs.values() if result.study)
    if not counts:
        return ""
    listed = ", ".join(f"{number} of {study}" for study, number in counts.items())
    return (
        f" Of the {len(record.runs)} runs, {sum(counts.values())} were made by other studies with "
        f"the same configuration ({listed}); their time is counted there."
    )


def as_markdown(question: str, verdict: Verdict, tables: Sequence[TextTable], command: str) -> str:
    """Format a study's question, verdict and tables as Markdown, the content of ``verdict.md``.

    Args:
        question: A sentence that ends in a question mark.
        verdict: The study's verdict.
        tables: Tables of its numbers.
        command: A command that repeats the study.

    Examples:
        >>> verdict = Verdict("Yes.", ("A beats B.",), ("One seed.",))
        >>> table = TextTable("Arms", "", ("arm", "loss"), (("A", "4.0"),))
        >>> print(as_markdown("Does it?", verdict, [table], "sinkgd experiment it"))
        # Does it?
        <BLANKLINE>
        **Yes.**
        <BLANKLINE>
        - A beats B.
        <BLANKLINE>
        Beware:
        <BLANKLINE>
        - One seed.
        <BLANKLINE>
        ## Arms
        <BLANKLINE>
        | arm | loss |
        |---|---|
        | A | 4.0 |
        <BLANKLINE>
        `sinkgd experiment it`
        <BLANKLINE>
    """
    parts = [f"# {question}", f"**{verdict.headline}**", _list(verdict.sentences)]
    if verdict.cautions:
        parts += ["Beware:", _list(verdict.cautions)]
    for table in tables:
        parts += [f"## {table.title}", _markdown_table(table), table.note]
    return "\n\n".join(part for part in [*parts, f"`{command}`"] if part) + "\n"


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _markdown_table(table: TextTable) -> str:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines[1] = "|" + "---|" * len(table.columns)
    return "\n".join(lines)


def study_page(study: Study, record: StudyRecord, results: StudyResults, verdict: Verdict) -> str:
    """Make a study's page.

    Args:
        study: The study, for its question and charts.
        record: The content of ``study.jsonl``; the page shows no results from other files.
        results: The results in the record.
        verdict: The verdict on the results.
    """
    grid = grid_table(results)
    analysis = _analysis(results)
    charts = [] if analysis is None else _charts(study, results, analysis)
    published = published_block(results.runs)
    return render(
        _TEMPLATE,
        title=f"Study {study.name}, {results.plan['scale']} scale",
        charts=[*charts, *published.charts],
        own_charts=charts,
        published=published,
        calculator=calculator_block(analysis),
        filters={},
        study=study,
        verdict=verdict,
        tables=[arms_table(results), *reach_tables(results)],
        details=[
            *([grid] if grid.rows else []),
            sessions_table(record),
            _settings_table("Configuration that all arms share", results.plan["shared"]),
            _settings_table("Arms as configured", results.plan["arms"]),
            _settings_table(
                "Environment", record.sessions[-1].environment if record.sessions else {}
            ),
        ],
        command=record.command,
        schedule=_schedule(results.plan),
    )


def paper_page(fits: Sequence[Fit], verdict: Verdict, command: str) -> str:
    """Make the page of the study `scale`, which is estimated and has no runs.

    Args:
        fits: Results of `run_on_paper`.
        verdict: The verdict on the fits.
        command: A command that repeats the study.
    """
    published = published_block(())
    return render(
        _TEMPLATE,
        title=f"Study {scale.NAME}, on paper",
        charts=list(published.charts),
        own_charts=[],
        published=published,
        calculator=calculator_block(None),
        filters={},
        study={"question": scale.QUESTION, "background": scale.BACKGROUND},
        verdict=verdict,
        tables=[fits_table(model, fits) for model in dict.fromkeys(fit.model for fit in fits)],
        details=[],
        command=command,
        schedule="",
    )


def _analysis(results: StudyResults) -> Analysis | None:
    """Compare the arms with the first control that did not diverge, if there is one.

    Arms with different models are not compared. The result is None if there is no reported run.
    """
    if not results.runs:
        return None
    if results.has_several_models:
        return results.analysis(None)
    baseline = next((one.arm.name for one in results.controls if not one.diverged), None)
    return results.analysis(baseline)


def _model(one: ArmResults) -> str:
    """Return the preset of an arm's model; adapters do not change it."""
    return preset_of(one.seeds[0].run)


def _charts(study: Study, results: StudyResults, analysis: Analysis) -> list[Chart]:
    identities = identify(analysis, [one.arm.name for one in results.arms])
    final = final_chart(results, study.axis, identities)
    measured = measured_charts(analysis, identities)
    own = study.charts(results, identities) if study.charts else []
    grids = grid_chart(results, identities)
    return [*own, final, *measured, *([grids] if grids else [])]


def _schedule(plan: Mapping[str, Any]) -> str:
    training = plan["shared"]["training"]
    tuning = f"; tuning with seed {plan['tuning_seed']}" if plan["tune"] else ""
    return (
        f"{training['steps']} steps of {training['batch_size']} × {training['sequence_length']} "
        f"tokens unless an arm says otherwise; warm-up over {training['warmup_fraction']:.0%} of "
        f"the steps, then a cosine to {training['final_lr_fraction']:.0%}. Seeds "
        f"{', '.join(map(str, plan['seeds']))}: the same text, order and weights for every "
        f"arm{tuning}."
    )


def _settings_table(title: str, content: Mapping[str, Any]) -> TextTable:
    return TextTable(title, "", ("setting", "value"), tuple(_setting_rows(content)))


def _setting_rows(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            rows += _setting_rows(value, f"{prefix}{key}.")
        elif value is not None and value not in ({}, [], False):
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append((f"{prefix}{key}", text))
    return rows
