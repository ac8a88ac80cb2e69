"""`sinkgd train`: one run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

import tyro

from sinkgd.lab.launch import STARTED_BY
from sinkgd.lab.train.config import RunConfig, load_defaults
from sinkgd.lab.train.folder import ResumePolicy


@dataclass(frozen=True)
class Train:
    """Train one model, or resume a run that was stopped.

    After Ctrl-C, SIGTERM or SIGHUP the run finishes the step, saves, and names the command that
    resumes it.

    For example:
      sinkgd train --out runs/first
      sinkgd report runs/first     (a table and a page of the run)
      sinkgd train --out runs/swan --optimizer.recipe swan --optimizer.matrix-lr 0.002
      sinkgd train --config runs/first/config.toml --out runs/longer --training.steps 2000
    """

    out: Path = Path("runs/train")
    """Folder of the run: results, configuration, checkpoints."""

    config: Path | None = None
    """TOML file with defaults of the options below, e.g. the config.toml of another run."""

    resume: ResumePolicy = "auto"
    """auto: resume if the folder holds a run; must: the folder must hold a checkpoint; never: the
    folder must not hold a run."""

    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults of the options, from the file of ``--config`` if it is given."""
        return cls(settings=load_defaults(arguments, RunConfig))

    def run(self) -> int:
        """Run the command; return the exit code."""
        from sinkgd.lab.launch import exit_code
        from sinkgd.lab.train import train

        outcome = train(
            self.settings,
            self.out,
            resume=self.resume,
            name_next_command=STARTED_BY not in os.environ,
        )
        return 0 if outcome.signal is None else exit_code(outcome.signal)
