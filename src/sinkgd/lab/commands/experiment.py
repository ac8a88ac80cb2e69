"""`sinkgd experiment`: a study, from its question to its page."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import tyro

from sinkgd.lab.commands.report import PAGE_FILE, report_study, show_fits
from sinkgd.lab.experiments.selection import STEP_OPTIONS, numbers, select_arms, select_step
from sinkgd.lab.experiments.studies import QUESTIONS, STUDIES, find_study
from sinkgd.lab.experiments.studies.scale import NAME as ON_PAPER
from sinkgd.lab.experiments.study import Scale, Study
from sinkgd.lab.launch import StopReport, exit_code, launched_ranks
from sinkgd.lab.train.config import ConfigError, SharedConfig, command_line, differences

if TYPE_CHECKING:
    from sinkgd.lab.experiments.study import StudyPlan

_AXES = ("iterations", "alpha", "batch")
# Options without a value.
_FLAGS = ("--tune", "--no-tune", "--reuse", "--no-reuse", "--dry-run", "--report")


@dataclass(frozen=True)
class Experiment:
    """Run a study: tune every arm alike, train each with several seeds, write a page and a verdict.

    An arm is a recipe with its settings. Each run has a folder of its own, as `sinkgd train` writes
    it. If the study is stopped or killed, the same command resumes it. The page and the verdict are
    made from study.jsonl only.
    """

    name: tyro.conf.Positional[str] = ""
    """Name of the study; without a name, all studies are listed."""

    scale: Scale = "machine"
    """machine: two cores, usually 20 to 110 minutes; paper: the benchmark's sizes, for GPUs."""

    data: Path | None = None
    """Corpus: prepared shards, text files or files in C4's layout; by default the study's own."""

    out: Path | None = None
    """Folder of the study; by default runs/NAME, at paper scale runs/NAME-paper."""

    seeds: int | None = None
    """Number of reported runs of each arm; their seeds count up from training.seed."""

    jobs: int | None = None
    """Number of runs that are trained at a time. By default one for each core at machine scale,
    else one. Without --training.threads, each run gets its share of the cores; a study that is
    continued keeps its number of threads."""

    tune: bool = True
    """Search each arm's grid first, with a seed that no reported run has. With --no-tune, arms keep
    their settings."""

    reuse: bool = True
    """Reuse tuning runs of other studies in the parent folder of --out that were made with the same
    configuration, code, versions and processor. With --no-reuse, every run is trained."""

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train nothing: build every arm's model without weights, and show sizes and memory. Problems
    with the folder --out are reported as the study itself would report them."""

    report: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train nothing: make page and verdict again from the study.jsonl in the folder --out."""

    iterations: str | None = None
    """Only for the study `iterations`: iteration counts of SR-Sinkhorn, separated by commas."""

    alpha: str | None = None
    """Only for the study `alpha`: values of α to try, separated by commas."""

    batch: str | None = None
    """Only for the study `batch`: batch sizes to try, in sequences, separated by commas."""

    lr: str | None = None
    """Learning rates to try in every arm, separated by commas; a single one is not tuned."""

    optimizer: str | None = None
    """Run only the arms of these recipes, names separated by commas. The name of an arm is also
    accepted, if no recipe has this name."""

    step: str | None = None
    """Run only the arm with this name, such as S2 of the study `lens`, and the controls. The
    options --optimizer.tau, --optimizer.iterations and --optimizer.lr change this arm; a given rate
    is not tuned."""

    step_tau: Annotated[float | None, tyro.conf.arg(name="optimizer.tau")] = None
    """Temperature τ of the arm of --step."""

    step_iterations: Annotated[int | None, tyro.conf.arg(name="optimizer.iterations")] = None
    """Iterations of the arm of --step."""

    step_lr: Annotated[float | None, tyro.conf.arg(name="optimizer.lr")] = None
    """Learning rate of the arm of --step."""

    shared: Annotated[SharedConfig, tyro.conf.arg(name="")] = field(default_factory=SharedConfig)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults of the options.

        If the arguments name a study, these are the study's settings, at the scale and for the
        model that the arguments give.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--scale", default="machine")
        parser.add_argument("--model.preset", dest="preset")
        try:
            given = parser.parse_known_args(arguments)[0]
        except argparse.ArgumentError:  # a value is missing; the main parser has a better message
            return cls()
        study = _study_among(arguments)
        if study is None or given.scale not in study.settings:
            return cls()
        return cls(shared=study.settings[given.scale].of_model(given.preset))

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid, or the study in the folder has another plan.
            StudyError: If a run fails.
            ResultsError: If there is no study to report, or a results file is damaged.
        """
        if not self.name:
            sys.stdout.write(_studies_text())
            return 0
        if self.name != ON_PAPER:
            find_study(self.name)
        if self.report:
            return report_study(self._folder())
        if self.name == ON_PAPER:
            return self._on_paper()
        plan = self._plan()
        if self.dry_run:
            return _dry_run(plan, self._folder())
        return self._train(plan)

    def _plan(self) -> "StudyPlan":
        """Combine the options into a plan, and check every run before the first run begins."""
        from sinkgd.lab.experiments.study import plan_of

        if launched_ranks() > 1:
            raise ConfigError(
                f"experiment starts a process for each run and cannot be one of {launched_ranks()} "
                "ranks; start it without torchrun"
            )
        for option in ("seeds", "jobs"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"{option} is {value}; it must be at least 1")
        rates = numbers("lr", self.lr)
        if len(rates) > 1 and not self.tune:
            raise ConfigError(f"lr is {self.lr!r}, but --no-tune tries no rates; give one")
        study = find_study(self.name)
        recipes = [word.strip() for word in (self.optimizer or "").split(",") if word.strip()]
        shared = self._shared_config()
        arms = select_arms(
            study,
            self.scale,
            shared,
            axis={option: numbers(option, getattr(self, option)) for option in _AXES},
            rates=rates,
            recipes=recipes,
        )
        arms = select_step(arms, self.step, self._step_options())
        if self.seeds is not None:
            arms = tuple(replace(arm, seeds=None) for arm in arms)  # the same number for all arms
        first = shared.training.seed
        count = study.settings[self.scale].seeds if self.seeds is None else self.seeds
        seeds = tuple(range(first, first + count))
        plan = plan_of(study, self.scale, shared=shared, arms=arms, seeds=seeds, tune=self.tune)
        plan.check()
        return plan

    def _step_options(self) -> dict[str, float]:
        """Return the options that change the arm of --step, by their command-line names."""
        given = {name: getattr(self, f"step_{name}") for name in STEP_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    def _shared_config(self) -> SharedConfig:
        """Return the settings of all arms, with --data and the threads per job filled in."""
        shared = self.shared
        if self.data is not None:
            data = replace(shared.data, corpus=str(self.data))
            if (self.data / "manifest.json").exists():  # shards have a vocabulary of their own
                data = replace(data, vocab_size=None)
            shared = replace(shared, data=data)
        if shared.training.threads is None:
            shared = replace(shared, training=replace(shared.training, threads=self._threads()))
        return shared

    def _threads(self) -> int | None:
        """Return the CPU threads of each run; None leaves them to torch.

        They are those with which the study began, or else a job's share of the cores.
        """
        from sinkgd.lab.experiments.engine import recorded_plan

        jobs = self._jobs()
        chosen = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
        begun = recorded_plan(self._folder())
        if begun is None:
            return chosen
        kept: int | None = begun["shared"]["training"].get("threads")
        if kept != chosen:
            _echo(
                f"note: the study in {self._folder()} began with {_threads_in_words(kept)} for "
                f"each run, which it keeps; a new study with --jobs {jobs} would have "
                f"{_threads_in_words(chosen)}"
            )
        return kept

    def _jobs(self) -> int:
        if self.jobs is not None:
            return self.jobs
        return (os.cpu_count() or 1) if self.scale == "machine" else 1

    def _folder(self) -> Path:
        default = self.name if self.scale == "machine" else f"{self.name}-{self.scale}"
        return Path("runs") / default if self.out is None else self.out

    def _train(self, plan: "StudyPlan") -> int:
        from sinkgd.lab.experiments.engine import run_study

        folder = self._folder()
        outcome = run_study(
            plan,
            folder,
            jobs=self._jobs(),
            command=self._command(),
            say=_echo,
            reuse=self.reuse,
        )
        if outcome.record.runs:
            report_study(folder)
        if outcome.signal is not None:
            _echo(
                f"stopped by {outcome.signal.name}; {outcome.left} of {outcome.runs} runs are "
                f"left. Everything is saved. Go on with: {self._command()}"
            )
            StopReport.made = True
            return exit_code(outcome.signal)
        return 0

    def _on_paper(self) -> int:
        """Estimate trainings that are too large for this machine; a dry run writes no file."""
        from sinkgd.lab.experiments.studies import scale

        folder = self._folder()
        command = shlex.join(["sinkgd", "experiment", self.name, "--out", str(folder)])
        fits = scale.run_on_paper(_echo)
        if not self.dry_run:
            scale.write_fits(folder, fits, command)
        show_fits(fits, command, None if self.dry_run else folder / PAGE_FILE)
        return 0

    def _command(self) -> str:
        """Return a command that repeats the study."""
        words = ["sinkgd", "experiment", self.name]
        plain = type(self)()
        for option in ("scale", "data", "out", "seeds", "jobs", *_AXES, "lr", "optimizer"):
            value = getattr(self, option)
            if value != getattr(plain, option):
                words += [f"--{option}", str(value)]
        if self.step is not None:
            words += ["--step", self.step]
        for name, value in self._step_options().items():
            words += [f"--optimizer.{name}", str(value)]
        words += [f"--no-{flag}" for flag in ("tune", "reuse") if not getattr(self, flag)]
        setting = find_study(self.name).settings[self.scale]
        preset = self.shared.model.preset
        changed = {name for name, _, _ in differences(setting.of_model(preset), self.shared)}
        if preset != setting.shared.model.preset:
            changed.add("model.preset")
        return shlex.join([*words, *_options_of(self.shared, changed)])


def _study_among(arguments: Sequence[str]) -> Study | None:
    """Return the study named by an argument that is not the value of an option."""
    for before, word in zip(["--tune", *arguments], arguments, strict=False):
        if word in STUDIES and (before in _FLAGS or not before.startswith("-")):
            return STUDIES[word]
    return None


def _options_of(config: SharedConfig, names: set[str]) -> list[str]:
    """Return the command-line options for the named fields."""
    words: list[str] = []
    for name in sorted(names):
        table, _, key = name.partition(".")
        only = replace(
            getattr(SharedConfig(), table), **{key: getattr(getattr(config, table), key)}
        )
        given = command_line(replace(SharedConfig(), **{table: only}))
        value = getattr(getattr(config, table), key)
        words += given or [f"--{name.replace('_', '-')}", str(value)]
    return words


def _dry_run(plan: "StudyPlan", folder: Path) -> int:
    from rich.console import Console

    from sinkgd.lab.experiments.dry_run import dry_run_table
    from sinkgd.lab.experiments.engine import read_begun
    from sinkgd.lab.report.console import terminal_table

    read_begun(plan, folder)  # raises the same errors as the study itself
    Console().print(terminal_table(dry_run_table(plan)))
    return 0


def _threads_in_words(threads: int | None) -> str:
    if threads is None:
        return "torch's number of threads"
    return "1 thread" if threads == 1 else f"{threads} threads"


def _echo(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _studies_text() -> str:
    """List the studies, each with its question and its number of trainings."""
    from sinkgd.lab.experiments.study import plan_of

    width = max(map(len, QUESTIONS))
    runs = {name: plan_of(study, "machine").runs_in_words for name, study in STUDIES.items()}
    lines = [
        f"  {name:<{width}}  {question} ({runs.get(name, 'on paper: no runs')})"
        for name, question in QUESTIONS.items()
    ]
    example = next(iter(STUDIES))
    return "\n".join(
        [
            "usage: sinkgd experiment NAME [OPTIONS]",
            "",
            "studies:",
            *lines,
            "",
            f"`sinkgd experiment {example} --help` shows the options; `--dry-run` shows the plan.",
            "",
        ]
    )


Experiment.__doc__ = f"""{Experiment.__doc__}
    Studies:
""" + "\n".join(f"      {name}: {question}" for name, question in QUESTIONS.items())
