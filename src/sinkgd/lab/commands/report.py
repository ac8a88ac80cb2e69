"""`sinkgd report`: a folder of runs as a table in the terminal and a page for the browser."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """Print the table of a folder of runs and write its page."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `sinkgd compare`, `train` or `experiment` wrote: */run.jsonl, run.jsonl or
    study.jsonl."""

    baseline: str | None = None
    """Recipe that the others are compared with, a name; by default adamw, else adamw-one-lr, else
    none."""

    out: Path | None = None
    """HTML file to write; by default report.html in the folder."""

    def run(self) -> int:
        """Run the command; returns the exit code.

        Raises:
            ReportError: If the folder holds no runs, or none of the baseline's recipe.
            ResultsError: If a results file is damaged.
        """
        from sinkgd.lab.commands.study_report import report_study
        from sinkgd.lab.experiments.record import STUDY_FILE

        if (self.folder / STUDY_FILE).exists():
            return report_study(self.folder)

        from rich.console import Console

        from sinkgd.lab.report import (
            analyze,
            default_baseline,
            read_runs,
            summary_tables,
            write_page,
        )

        runs = read_runs(self.folder)
        baseline = self.baseline or default_baseline(runs)
        console = Console()
        console.print(summary_tables(analyze(runs, baseline), console.width))
        path = self.out or self.folder / "report.html"
        write_page(
            path,
            runs,
            baseline=baseline,
            title=f"Report of {self.folder.resolve().name}",
            command=self._command(baseline),
        )
        console.print(f"page: {path}", markup=False, highlight=False, soft_wrap=True)
        return 0

    def _command(self, baseline: str | None) -> str:
        chosen = ["--baseline", baseline] if baseline else []
        return shlex.join(["sinkgd", "report", str(self.folder), *chosen])
