"""The page of a comparison: the verdict, the cards, the charts and the tables, in one file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkgd.lab.disk import write_whole
from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, analyze
from sinkgd.lab.report.calculator import calculator_block
from sinkgd.lab.report.cards import cards
from sinkgd.lab.report.identity import identify
from sinkgd.lab.report.measured_charts import measured_charts
from sinkgd.lab.report.published_block import published_block
from sinkgd.lab.report.settings import compare_settings
from sinkgd.lab.report.shell import render
from sinkgd.lab.report.summary import state_of
from sinkgd.lab.report.tables import header, summary_rows
from sinkgd.lab.report.verdict import judge
from sinkgd.lab.results import Run

_TEMPLATE = Path(__file__).parent / "page.html"
_FILTERS: dict[str, Callable[..., str]] = {
    "state": state_of,
    "loss": quantities.loss,
    "count": quantities.count,
    "duration": quantities.duration,
}


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
    write_whole(path, build_page(runs, baseline=baseline, title=title, command=command))


def _render(analysis: Analysis, title: str, command: str) -> str:
    identities = identify(analysis)
    verdict = judge(analysis)
    charts = measured_charts(analysis, identities)
    published = published_block(analysis.runs)
    return render(
        _TEMPLATE,
        title=title,
        charts=[*charts, *published.charts],
        measured_charts=charts,
        published=published,
        calculator=calculator_block(analysis),
        filters=_FILTERS,
        command=command,
        analysis=analysis,
        verdict=verdict,
        identities=identities,
        cards=cards(analysis, verdict),
        columns=header(analysis),
        rows=summary_rows(analysis),
        config=compare_settings(analysis, lambda run: run.start.config),
        environment=compare_settings(analysis, lambda run: run.start.environment),
    )
