"""The page of a study in one file: question and verdict, charts, tables, and how it was made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkgd.lab.experiments.studies import scale
from sinkgd.lab.experiments.studies.scale import Fit, fits_table
from sinkgd.lab.experiments.study import Study
from sinkgd.lab.experiments.study_charts import final_chart, grid_chart
from sinkgd.lab.experiments.study_record import StudyRecord
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_tables import arms_table, grid_table, reach_tables, sessions_table
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.report import calculator_block, published_block
from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.figures import Chart, identify
from sinkgd.lab.report.page import measured_charts
from sinkgd.lab.report.shell import render

_TEMPLATE = Path(__file__).parent / "study.html"


def study_page(study: Study, record: StudyRecord, results: StudyResults, verdict: Verdict) -> str:
    """Make the page.

    Args:
        study: The study, for its question and charts.
        record: The content of ``study.jsonl``; the page shows nothing else.
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
            _table("Configuration that all arms share", results.plan["shared"]),
            _table("Arms as configured", results.plan["arms"]),
            _table("Environment", record.sessions[-1].environment if record.sessions else {}),
        ],
        command=record.command,
        schedule=_schedule(results.plan),
    )


def paper_page(fits: Sequence[Fit], verdict: Verdict, command: str) -> str:
    """Make the page of the study `scale`, which is planned on paper.

    Args:
        fits: From `run_on_paper`.
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
    """Compare the arms with the first control without divergence; None without a run."""
    if not results.runs:
        return None
    baseline = next((one.arm.name for one in results.controls if not one.diverged), None)
    return results.analysis(baseline)


def _charts(study: Study, results: StudyResults, analysis: Analysis) -> list[Chart]:
    everyone = {one.arm.name for one in results.arms}
    identities = identify(analysis)
    final = final_chart(results, study.axis, identities)
    measured = measured_charts(analysis, identities)
    if not everyone <= set(identities):  # an arm with only a grid has no color yet
        return [final, *measured]
    own = study.charts(results, identities) if study.charts else []
    grids = grid_chart(results, identities)
    return [*own, final, *measured, *([grids] if grids else [])]


def _schedule(plan: Mapping[str, Any]) -> str:
    training = plan["shared"]["training"]
    return (
        f"{training['steps']} steps of {training['batch_size']} × {training['sequence_length']} "
        f"tokens unless an arm says otherwise; warm-up over {training['warmup_fraction']:.0%} of "
        f"the steps, then a cosine to {training['final_lr_fraction']:.0%}. Seeds "
        f"{', '.join(map(str, plan['seeds']))}: the same text, order and weights for every arm; "
        f"tuning with seed {plan['tuning_seed']}."
    )


def _table(title: str, content: Mapping[str, Any]) -> TextTable:
    return TextTable(title, "", ("setting", "value"), tuple(_rows(content)))


def _rows(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            rows += _rows(value, f"{prefix}{key}.")
        elif value is not None and value not in ({}, [], False):
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append((f"{prefix}{key}", text))
    return rows
