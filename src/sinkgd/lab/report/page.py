"""The page: one self-contained HTML file that needs no network and opens from the disk.

Every string of a run is escaped by the template. Figures and plotly.js are inlined, and a content
security policy forbids the page to load anything.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, analyze
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.cards import cards
from sinkgd.lab.report.charts import Chart
from sinkgd.lab.report.identity import identify
from sinkgd.lab.report.loss_charts import loss_chart
from sinkgd.lab.report.settings import compare_settings
from sinkgd.lab.report.summary import state_of
from sinkgd.lab.report.tables import header, summary_rows
from sinkgd.lab.report.verdict import judge
from sinkgd.lab.results import Run

_FOLDER = Path(__file__).parent


def build_page(runs: Sequence[Run], *, baseline: str | None, title: str, command: str) -> str:
    """Make the page's HTML.

    Args:
        runs: At least one; unfinished and failed ones are shown as such.
        baseline: The recipe that the others are compared with, or None.
        title: Of the page, plain text.
        command: The shell command that repeats the comparison, plain text.

    Raises:
        ReportError: If there are no runs, or none of the baseline's recipe.
    """
    return _render(analyze(runs, baseline), title, command)


def write_page(
    path: Path, runs: Sequence[Run], *, baseline: str | None, title: str, command: str
) -> None:
    """Make the page and put it at ``path`` in one move: no reader sees half a page.

    Args:
        path: The file; its folder is made when absent.
        runs: As in `build_page`, like the rest.
        baseline: The recipe that the others are compared with, or None.
        title: Of the page, plain text.
        command: The shell command that repeats the comparison, plain text.

    Raises:
        ReportError: If there are no runs, or none of the baseline's recipe.
    """
    page = build_page(runs, baseline=baseline, title=title, command=command)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        temporary.chmod(0o644)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _render(analysis: Analysis, title: str, command: str) -> str:
    identities = identify(analysis)
    verdict = judge(analysis)
    charts = [
        loss_chart(analysis, identities, "tokens"),
        loss_chart(analysis, identities, "seconds"),
        *bar_charts(analysis, identities),
    ]
    return _template().render(
        title=title,
        command=command,
        analysis=analysis,
        verdict=verdict,
        identities=identities,
        cards=cards(analysis, verdict),
        charts=charts,
        figures=_figures(charts),
        columns=header(analysis),
        rows=summary_rows(analysis),
        config=compare_settings(analysis, lambda run: run.start.config),
        environment=compare_settings(analysis, lambda run: run.start.environment),
        plotly=get_plotlyjs(),
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        javascript=(_FOLDER / "page.js").read_text(encoding="utf-8"),
    )


def _figures(charts: Sequence[Chart]) -> dict[str, Any]:
    return {chart.key: chart.figure for chart in charts}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A NaN would be no JSON; `tojson` escapes what could end the script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["state"] = state_of
    environment.filters["loss"] = quantities.loss
    environment.filters["count"] = quantities.count
    environment.filters["duration"] = quantities.duration
    return environment.get_template("page.html")
