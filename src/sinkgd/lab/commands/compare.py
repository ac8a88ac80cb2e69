"""`sinkgd compare`: train with several optimizers on the same model, text, order and schedule."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self

import tyro

from sinkgd.lab.launch import (
    SIGNALS,
    STARTED_BY,
    Interrupt,
    StopReport,
    exit_code,
    launched_ranks,
)
from sinkgd.lab.options import suggest
from sinkgd.lab.train.config import (
    ConfigError,
    OptimizerConfig,
    RunConfig,
    SharedConfig,
    command_line,
    load_defaults,
)
from sinkgd.lab.train.folder import Admission, RunFolder, check_kind
from sinkgd.lab.train.resolve import resolve

_PROGRAM = "from _sinkgd_cli import main; raise SystemExit(main(child=True))"


def run_in_fresh_process(arguments: Sequence[str]) -> int:
    """Run ``sinkgd`` with ``arguments`` in this terminal; return its exit code.

    Ctrl-C, SIGTERM and SIGHUP are forwarded once. This function then waits for the command, which
    may have work to save. On Linux the command also stops and saves when this process is killed.
    """
    # The child has its own process group, because otherwise it would get Ctrl-C twice.
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        env=os.environ | {STARTED_BY: "compare"},
        process_group=0,
    )
    try:
        with Interrupt(forward=child.send_signal):
            code = child.wait()
    except KeyboardInterrupt:  # the second Ctrl-C
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    # A signal that arrives before the command has installed its handlers kills the command.
    return exit_code(signal.Signals(-code)) if code < 0 else code


_MOST_SEEDS = 1000
STOPPED = tuple(map(exit_code, SIGNALS))


@dataclass(frozen=True)
class Compare:
    """Train the same model on the same text, in the same order, with several optimizers.

    Runs follow one another, each in a process of its own. Then the table is printed and the page
    written. Without options the command trains a nano LLaMA on real text for about ten minutes on
    two cores; `make demo` does the same with fewer steps.
    If the comparison is stopped or killed, the same command resumes it; finished runs are not
    repeated.

    For example:
      sinkgd compare
      sinkgd compare --optimizers sinkgd,swan,adamw,adamw-one-lr --seeds 3 --out runs/four
      sinkgd compare --model.preset llama-60m --data.corpus shards/c4 --training.steps 10000
    """

    optimizers: str = "sinkgd,sinkgd-paper,adamw"
    """Recipes to compare, names separated by commas, e.g. sinkgd,sinkgd-paper,swan,adamw,muon;
    see docs/recipes.md for all of them."""

    seeds: int = 1
    """Number of runs of each recipe; their seeds count up from training.seed."""

    baseline: str | None = None
    """Name of the recipe that the others are compared with; by default adamw, else adamw-one-lr,
    else none."""

    out: Path = Path("runs/compare")
    """Folder of the comparison: a folder for each run, and report.html."""

    config: Path | None = None
    """TOML file with defaults for the options below, one table for each group."""

    shared: Annotated[SharedConfig, tyro.conf.arg(name="")] = field(default_factory=SharedConfig)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults of the options, from the file of ``--config`` if it is given."""
        return cls(shared=load_defaults(arguments, SharedConfig))

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid, or an existing run has another configuration or
                was trained on another text.
            DataError: If the text is needed but absent.
            RunFolderError: If the folder holds a single run or a study.
        """
        started = time.perf_counter()
        runs = self._plan()
        check_kind(self.out, "comparison")
        open_runs = [name for name, config in runs.items() if not self._is_finished(name, config)]
        begun_before = any(RunFolder(self.out / name).has_begun() for name in runs)
        if not open_runs:
            self._check_text(runs, finished=True)
        for i, (name, config) in enumerate(runs.items(), start=1):
            if name not in open_runs:
                continue
            self._check_text(runs, finished=False)
            print(f"run {i} of {len(runs)}: {name}", flush=True)  # noqa: T201
            code = self._train(name, config)
            if code in STOPPED:
                print(f"Go on with: {self._command()}", flush=True)  # noqa: T201
                StopReport.made = True
            if code != 0:
                return code
        minutes = f"{(time.perf_counter() - started) / 60:.1f} minutes"
        self._report(list(runs), f"{minutes} this time" if begun_before else minutes)
        return 0

    def _plan(self) -> dict[str, RunConfig]:
        """Name every run and check its configuration before any run begins."""
        if launched_ranks() > 1:
            raise ConfigError(
                f"compare starts a process for each run and cannot be one of {launched_ranks()} "
                "ranks; start it without torchrun, or use torchrun with `sinkgd train`"
            )
        recipes = [name.strip() for name in self.optimizers.split(",") if name.strip()]
        if not recipes:
            raise ConfigError("optimizers is empty; name at least one, e.g. sinkgd,adamw")
        if not 1 <= self.seeds <= _MOST_SEEDS:
            raise ConfigError(f"seeds is {self.seeds}; it must be from 1 to {_MOST_SEEDS}")
        if self.baseline is not None and self.baseline not in recipes:
            raise ConfigError(
                f"baseline is {self.baseline!r}, which is not among the optimizers; "
                f"{suggest(self.baseline, recipes)}"
            )
        first = self.shared.training.seed
        return {
            f"{recipe}-seed{seed}": self._run_config(recipe, seed)
            for seed in range(first, first + self.seeds)
            for recipe in recipes
        }

    def _run_config(self, recipe: str, seed: int) -> RunConfig:
        tables = {**vars(self.shared), "training": replace(self.shared.training, seed=seed)}
        return resolve(RunConfig(optimizer=OptimizerConfig(recipe=recipe), **tables))

    def _is_finished(self, name: str, config: RunConfig) -> bool:
        return RunFolder(self.out / name).admit(config, "auto") is Admission.NOTHING

    def _check_text(self, runs: Mapping[str, RunConfig], *, finished: bool) -> None:
        """Refuse runs that were trained on a text that differs from the present one.

        Raises:
            ConfigError: If the texts differ; the message gives the hashes of both.
            DataError: If the text is absent, and there are runs to train or a run names another
                corpus.
        """
        from sinkgd.lab.data import DataError
        from sinkgd.lab.train.identity import check_data, knows_its_text, with_absolute_paths
        from sinkgd.lab.train.run import print_to_stderr
        from sinkgd.lab.train.setup import open_dataset

        folders = [RunFolder(self.out / name) for name in runs]
        starts = {folder: folder.start() for folder in folders if folder.has_begun()}
        known = {folder: start for folder, start in starts.items() if knows_its_text(start)}
        if not known:
            return
        corpus = self.shared.data.corpus
        absolute = with_absolute_paths(self.shared).data.corpus
        try:
            dataset = open_dataset(self.shared.data, print_to_stderr)
        except DataError:
            same = (folder.config_of(run).data.corpus == absolute for folder, run in known.items())
            if finished and all(same):
                return  # nothing is left to train, so the text is not needed
            raise
        for start in known.values():
            check_data(start, dataset.manifest, corpus)

    def _train(self, name: str, config: RunConfig) -> int:
        return run_in_fresh_process(["train", "--out", str(self.out / name), *command_line(config)])

    def _report(self, names: Sequence[str], lasted: str) -> None:
        from rich.console import Console

        from sinkgd.lab.report import (
            analyze,
            default_baseline,
            judge,
            summary_tables,
            write_page,
        )
        from sinkgd.lab.report.analysis import preset_of
        from sinkgd.lab.results import Run

        runs = [Run.read(RunFolder(self.out / name).results) for name in names]
        baseline = self.baseline or default_baseline(runs)
        page = self.out / "report.html"
        write_page(
            page,
            runs,
            baseline=baseline,
            title=f"{preset_of(runs[0])} on {self.shared.data.corpus}",
            command=self._command(),
        )
        console = Console()
        analysis = analyze(runs, baseline)
        console.print(summary_tables(analysis, console.width))
        for caution in judge(analysis).cautions:
            console.print(f"beware: {caution}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"\n{lasted}. The page: {page}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _command(self) -> str:
        own = {"--optimizers": self.optimizers, "--seeds": self.seeds, "--baseline": self.baseline}
        options = [part for name, value in own.items() if value for part in (name, str(value))]
        return shlex.join(
            ["sinkgd", "compare", "--out", str(self.out), *options, *command_line(self.shared)]
        )
