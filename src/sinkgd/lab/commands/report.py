"""`sinkgd report`: a folder of runs as a table in the terminal and a page for the browser."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sinkgd.lab.train.config import ConfigError


@dataclass(frozen=True)
class Report:
    """Print the table of a folder of runs and write its page."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that `sinkgd compare`, `train` or `experiment` wrote: */run.jsonl, run.jsonl or
    study.jsonl; or of such files under other names, as benchmarks/demo has them."""

    baseline: str | None = None
    """Recipe that the others are compared with, a name; by default adamw, else adamw-one-lr, else
    none. A study compares its arms with its controls."""

    out: Path | None = None
    """HTML file to write; by default report.html in the folder. A study's verdict.md goes beside
    it."""

    cdn: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the page take plotly.js from cdn.plot.ly: 0.3 MB instead of 5, for repositories and web
    sites. The browser checks the file's hash; without a network the page has no charts."""

    def run(self) -> int:
        """Run the command; returns the exit code.

        Raises:
            ConfigError: If a baseline is given for a study.
            ReportError: If the folder holds no runs, or none of the baseline's recipe.
            ResultsError: If a results file is damaged.
        """
        from sinkgd.lab.commands.study_report import report_study
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
        path = self.out or folder / "report.html"
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
