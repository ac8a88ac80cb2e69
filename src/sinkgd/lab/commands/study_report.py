"""A study shown: its tables and verdict in the terminal, its page in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinkgd.lab.experiments.studies import find_study, scale

if TYPE_CHECKING:
    from sinkgd.lab.bench.sheet import Sheet
    from sinkgd.lab.experiments.on_paper import Fit
    from sinkgd.lab.experiments.record import StudyRecord
    from sinkgd.lab.experiments.verdict import Verdict


def report_study(folder: Path) -> int:
    """Make page and verdict again from ``study.jsonl`` alone; return the exit code.

    Raises:
        ResultsError: If there is no study, or it is damaged.
    """
    from sinkgd.lab.experiments.on_paper import is_on_paper, read_fits
    from sinkgd.lab.experiments.record import STUDY_FILE, StudyRecord

    path = folder / STUDY_FILE
    if is_on_paper(path):
        command, fits = read_fits(path)
        show_fits(fits, command, folder)
    else:
        write_report(StudyRecord.read(path), folder)
    return 0


def write_report(record: "StudyRecord", folder: Path) -> None:
    """Print the table and the verdict of a study, and write its pages."""
    from sinkgd.lab.experiments.markdown import as_markdown
    from sinkgd.lab.experiments.page import study_page
    from sinkgd.lab.experiments.results import StudyResults
    from sinkgd.lab.experiments.sheets import arms_sheet, reach_sheets, short_sheet

    study = find_study(record.plan["study"])
    results = StudyResults.of(record)
    verdict = study.judge(results)
    _print([short_sheet(results)], verdict)
    sheets = [arms_sheet(results), *reach_sheets(results)]
    _write(
        folder,
        study_page(study, record, results, verdict),
        as_markdown(study.question, verdict, sheets, record.command),
    )


def show_fits(fits: "Sequence[Fit]", command: str, folder: Path | None) -> None:
    """Print the tables and the verdict of a study on paper, and write its pages into ``folder``."""
    from sinkgd.lab.experiments import on_paper
    from sinkgd.lab.experiments.markdown import as_markdown
    from sinkgd.lab.experiments.page import paper_page

    verdict = on_paper.judge(fits)
    models = dict.fromkeys(fit.model for fit in fits)
    sheets = [on_paper.fits_sheet(model, fits) for model in models]
    _print(sheets, verdict)
    if folder is not None:
        text = as_markdown(scale.QUESTION, verdict, sheets, command)
        _write(folder, paper_page(fits, verdict, command), text)


def _write(folder: Path, page: str, text: str) -> None:
    """Write the page, and the same in a text that is small enough to be kept."""
    from rich.console import Console

    from sinkgd.lab.experiments.markdown import VERDICT_FILE
    from sinkgd.lab.report.shell import write_whole

    path = folder / "report.html"
    write_whole(path, page)
    write_whole(folder / VERDICT_FILE, text)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"\npage: {path}")


def _print(sheets: "Sequence[Sheet]", verdict: "Verdict") -> None:
    from rich.console import Console

    from sinkgd.lab.bench.sheet import terminal_table

    for sheet in sheets:
        Console().print(terminal_table(sheet), "\n")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in (verdict.headline, *verdict.sentences):
        console.print(line)
    for line in verdict.cautions:
        console.print(f"Caution: {line}")
