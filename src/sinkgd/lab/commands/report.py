"""`sinkgd report`: a folder of runs, or a study, as tables in the terminal and as a page."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sinkgd.lab.train.config import ConfigError

if TYPE_CHECKING:
    from sinkgd.lab.experiments.studies.scale import Fit
    from sinkgd.lab.experiments.study_record import StudyRecord
    from sinkgd.lab.experiments.study_verdict import Verdict
    from sinkgd.lab.report.console import TextTable

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """Print the table of a folder of runs, or of a study, and write its page."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `sinkgd compare`, `train` or `experiment` wrote: it holds */run.jsonl, run.jsonl
    or study.jsonl. Or a folder, such as benchmarks/demo/2026-11-28, with copies of the run.jsonl of
    several runs, each copy under a name of its own that ends in .jsonl. Or the file of one run."""

    baseline: str | None = None
    """Name of the recipe that the others are compared with; by default adamw, else adamw-one-lr,
    else none. A study compares its arms with its controls."""

    out: Path | None = None
    """HTML file to write; by default report.html in the folder. A study's verdict.md is written to
    the same folder."""

    cdn: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the page load plotly.js from cdn.plot.ly. The page then takes 0.3 MB instead of 5 MB,
    which suits repositories and web sites. The browser checks the file's hash; without a network
    the page has no charts."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If a baseline is given for a study.
            ReportError: If the folder holds no runs, or no run of the baseline's recipe.
            ResultsError: If a results file is damaged.
        """
        from sinkgd.lab.experiments.study_record import STUDY_FILE

        if not (self.folder / STUDY_FILE).exists():
            return self._report_runs()
        if self.baseline is not None:
            raise ConfigError(
                f"baseline is {self.baseline!r}, but {self.folder} holds a study, which compares "
                "its arms with its controls; leave the option out"
            )
        return report_study(self.folder, self.out, cdn=self.cdn)

    def _report_runs(self) -> int:
        from rich.console import Console

        from sinkgd.lab.disk import write_whole
        from sinkgd.lab.report import (
            analyze,
            build_page,
            default_baseline,
            judge,
            read_runs,
            summary_tables,
        )
        from sinkgd.lab.report.shell import from_cdn

        runs = read_runs(self.folder)
        baseline = self.baseline or default_baseline(runs)
        console = Console()
        analysis = analyze(runs, baseline)
        console.print(summary_tables(analysis, console.width))
        for caution in judge(analysis).cautions:
            console.print(f"beware: {caution}", markup=False, highlight=False, soft_wrap=True)
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        path = self.out or folder / PAGE_FILE
        page = build_page(
            runs,
            baseline=baseline,
            title=f"Report of {self.folder.resolve().name}",
            command=self._command(baseline),
        )
        write_whole(path, from_cdn(page) if self.cdn else page)
        console.print(f"page: {path}", markup=False, highlight=False, soft_wrap=True)
        return 0

    def _command(self, baseline: str | None) -> str:
        chosen = ["--baseline", baseline] if baseline else []
        return shlex.join(["sinkgd", "report", str(self.folder), *chosen])


def report_study(folder: Path, page: Path | None = None, *, cdn: bool = False) -> int:
    """Make page and verdict again from ``study.jsonl`` only; return the exit code.

    Args:
        folder: Folder of the study.
        page: Path of the page, with the verdict beside it; by default ``report.html`` in the
            folder.
        cdn: Whether the page loads plotly.js from its CDN.

    Raises:
        ResultsError: If there is no study, or its file is damaged.
    """
    from sinkgd.lab.experiments.studies.scale import is_on_paper, read_fits
    from sinkgd.lab.experiments.study_record import STUDY_FILE, StudyRecord

    path = folder / STUDY_FILE
    page = page or folder / PAGE_FILE
    if is_on_paper(path):
        command, fits = read_fits(path)
        show_fits(fits, command, page, cdn=cdn)
    else:
        _write_study(StudyRecord.read(path), page, cdn=cdn)
    return 0


def _write_study(record: "StudyRecord", page: Path, *, cdn: bool = False) -> None:
    """Print a study's table and verdict; write its page, and its verdict to the same folder."""
    from sinkgd.lab.experiments.studies import find_study
    from sinkgd.lab.experiments.study_report import (
        arms_table,
        as_markdown,
        reach_tables,
        short_table,
        study_page,
    )
    from sinkgd.lab.experiments.study_results import StudyResults
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
    """Print tables and verdict of a study without runs, and write its page if a path is given."""
    from sinkgd.lab.experiments.studies import scale
    from sinkgd.lab.experiments.study_report import as_markdown, paper_page

    verdict = scale.judge(fits)
    models = dict.fromkeys(fit.model for fit in fits)
    tables = [scale.fits_table(model, fits) for model in models]
    _print(tables, verdict)
    if page is not None:
        text = as_markdown(scale.QUESTION, verdict, tables, command)
        _write(page, paper_page(fits, verdict, command), text, cdn=cdn)


def _write(path: Path, page: str, text: str, *, cdn: bool) -> None:
    """Write the page, and the Markdown ``text`` of the verdict to the same folder."""
    from rich.console import Console

    from sinkgd.lab.disk import write_whole
    from sinkgd.lab.experiments.study_report import VERDICT_FILE
    from sinkgd.lab.report.shell import from_cdn

    write_whole(path, from_cdn(page) if cdn else page)
    write_whole(path.with_name(VERDICT_FILE), text)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"\npage: {path}")


def _print(tables: "Sequence[TextTable]", verdict: "Verdict") -> None:
    from rich.console import Console

    from sinkgd.lab.report.console import terminal_table

    for table in tables:
        Console().print(terminal_table(table), "\n")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in (verdict.headline, *verdict.sentences):
        console.print(line)
    for line in verdict.cautions:
        console.print(f"Caution: {line}")
