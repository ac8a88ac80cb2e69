"""A study shown: its tables and verdict in the terminal, its page in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinkgd.lab.experiments.studies import find_study, scale

if TYPE_CHECKING:
    from sinkgd.lab.experiments.studies.scale import Fit
    from sinkgd.lab.experiments.study_record import StudyRecord
    from sinkgd.lab.experiments.study_verdict import Verdict
    from sinkgd.lab.report.console import TextTable

PAGE_FILE = "report.html"


def report_study(folder: Path, page: Path | None = None, *, cdn: bool = False) -> int:
    """Make page and verdict again from ``study.jsonl`` alone; return the exit code.

    Args:
        folder: Has the study.
        page: Where the page goes, the verdict beside it; by default ``report.html`` in the folder.
        cdn: Let the page take plotly.js from its CDN.

    Raises:
        ResultsError: If there is no study, or it is damaged.
    """
    from sinkgd.lab.experiments.studies.scale import is_on_paper, read_fits
    from sinkgd.lab.experiments.study_record import STUDY_FILE, StudyRecord

    path = folder / STUDY_FILE
    page = page or folder / PAGE_FILE
    if is_on_paper(path):
        command, fits = read_fits(path)
        show_fits(fits, command, page, cdn=cdn)
    else:
        write_report(StudyRecord.read(path), page, cdn=cdn)
    return 0


def write_report(record: "StudyRecord", page: Path, *, cdn: bool = False) -> None:
    """Print the table and the verdict of a study, and write its page and the verdict beside it."""
    from sinkgd.lab.experiments.study_page import study_page
    from sinkgd.lab.experiments.study_results import StudyResults
    from sinkgd.lab.experiments.study_tables import (
        arms_table,
        as_markdown,
        reach_tables,
        short_table,
    )
    from sinkgd.lab.experiments.study_verdict import with_cost

    study = find_study(record.plan["study"])
    results = StudyResults.of(record)
    verdict = with_cost(results, study.judge(results))
    _print([short_table(results)], verdict)
    tables = [arms_table(results), *reach_tables(results)]
    _write(
        page,
        study_page(study, record, results, verdict),
        as_markdown(study.question, verdict, tables, record.command),
        cdn=cdn,
    )


def show_fits(fits: "Sequence[Fit]", command: str, page: Path | None, *, cdn: bool = False) -> None:
    """Print the tables and the verdict of a study on paper, and write its page, where asked to."""
    from sinkgd.lab.experiments.study_page import paper_page
    from sinkgd.lab.experiments.study_tables import as_markdown

    verdict = scale.judge(fits)
    models = dict.fromkeys(fit.model for fit in fits)
    tables = [scale.fits_table(model, fits) for model in models]
    _print(tables, verdict)
    if page is not None:
        text = as_markdown(scale.QUESTION, verdict, tables, command)
        _write(page, paper_page(fits, verdict, command), text, cdn=cdn)


def _write(path: Path, page: str, text: str, *, cdn: bool) -> None:
    """Write the page, and the same as a text beside it."""
    from rich.console import Console

    from sinkgd.lab.disk import write_whole
    from sinkgd.lab.experiments.study_tables import VERDICT_FILE
    from sinkgd.lab.report.shell import from_cdn

    write_whole(path, from_cdn(page) if cdn else page)
    write_whole(path.with_name(VERDICT_FILE), text)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"\npage: {path}")


def _print(tables: "Sequence[TextTable]", verdict: "Verdict") -> None:
    from rich.console import Console

    from sinkgd.lab.report.console import terminal_table

    for sheet in tables:
        Console().print(terminal_table(sheet), "\n")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in (verdict.headline, *verdict.sentences):
        console.print(line)
    for line in verdict.cautions:
        console.print(f"Caution: {line}")
