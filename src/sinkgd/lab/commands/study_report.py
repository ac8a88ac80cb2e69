"""A study shown: its tables and verdict in the terminal, its page in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinkgd.lab.experiments.studies import find_study

if TYPE_CHECKING:
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
    """Print the table and the verdict of a study, and write its page."""
    from rich.console import Console

    from sinkgd.lab.bench.sheet import terminal_table
    from sinkgd.lab.experiments.page import study_page
    from sinkgd.lab.experiments.results import StudyResults
    from sinkgd.lab.experiments.sheets import short_sheet
    from sinkgd.lab.report.shell import write_whole

    study = find_study(record.plan["study"])
    results = StudyResults.of(record)
    verdict = study.judge(results)
    path = folder / "report.html"
    write_whole(path, study_page(study, record, results, verdict))
    Console().print(terminal_table(short_sheet(results)), "\n")
    _print_verdict(verdict)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"\npage: {path}")


def show_fits(fits: "Sequence[Fit]", command: str, folder: Path | None) -> None:
    """Print the tables and the verdict of a study on paper, and write its page into ``folder``."""
    from rich.console import Console

    from sinkgd.lab.bench.sheet import terminal_table
    from sinkgd.lab.experiments import on_paper
    from sinkgd.lab.experiments.page import paper_page
    from sinkgd.lab.report.shell import write_whole

    verdict = on_paper.judge(fits)
    for model in dict.fromkeys(fit.model for fit in fits):
        Console().print(terminal_table(on_paper.fits_sheet(model, fits)), "\n")
    _print_verdict(verdict)
    if folder is not None:
        path = folder / "report.html"
        write_whole(path, paper_page(fits, verdict, command))
        Console(soft_wrap=True, highlight=False, markup=False).print(f"\npage: {path}")


def _print_verdict(verdict: "Verdict") -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in (verdict.headline, *verdict.sentences):
        console.print(line)
    for line in verdict.cautions:
        console.print(f"Caution: {line}")
