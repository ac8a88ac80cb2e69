"""Runs of grids that the studies side by side have in common, so that each is trained once.

In one environment a run's losses follow from its configuration to the bit, and of a grid's runs
losses are all that counts. Reported runs have seconds, too, which follow from what else the machine
does; so a study trains its own, side by side.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from sinkgd.lab.experiments.on_paper import is_on_paper
from sinkgd.lab.experiments.plan import Task
from sinkgd.lab.experiments.record import STUDY_FILE, RunResult, StudyRecord
from sinkgd.lab.results import ResultsError
from sinkgd.lab.train.config import RunConfig, as_tables
from sinkgd.lab.train.identity import DATA, knows_its_text

# Of an environment, what losses follow from.
_EQUAL = ("sinkgd", "torch", "cpu", "threads", "device")


@dataclass(frozen=True)
class Shelf:
    """Finished runs of grids, by their configurations."""

    results: Mapping[str, RunResult]

    @classmethod
    def beside(
        cls, folder: Path, environment: Mapping[str, Any], say: Callable[[str], None]
    ) -> Self:
        """Collect what the studies beside one have trained.

        Args:
            folder: Of the study; its neighbours are read.
            environment: Of this process, as `describe_environment` gives it.
            say: Told of a neighbour that cannot be read.
        """
        found: dict[str, RunResult] = {}
        for path in sorted(folder.absolute().parent.glob(f"*/{STUDY_FILE}")):
            if path.parent == folder.absolute() or not path.is_file() or is_on_paper(path):
                continue
            try:
                record = StudyRecord.read(path)
            except (OSError, ResultsError) as error:
                say(f"no run of a study beside this one is used: {error}")
                continue
            if _alike(record, environment):
                for result in record.runs.values():
                    if (
                        result.tuning
                        and result.run.finished
                        and not result.study
                        and knows_its_text(result.run.start)
                    ):
                        lent = replace(result, study=record.plan["study"])
                        found[_key(result.run.start.config, _text(result))] = lent
        return cls(found)

    def find(self, task: Task, config: RunConfig, text_sha256: str) -> RunResult | None:
        """Return the result of a run that was trained elsewhere.

        Args:
            task: The run that is to be made.
            config: Of the run, resolved.
            text_sha256: Of the shards that it would be trained on.

        Returns:
            The result under the task's names; None of a reported run, and where there is none.
        """
        key = _key(as_tables(config), text_sha256)
        result = self.results.get(key) if task.tuning else None
        if result is None:
            return None
        start = replace(result.run.start, name=task.name)
        return RunResult(
            task.arm.name, task.tuning, task.point, replace(result.run, start=start), result.study
        )


def _alike(record: StudyRecord, environment: Mapping[str, Any]) -> bool:
    """Whether every sitting of a study was like this one; one that was killed is unknown."""
    return bool(record.sittings) and all(
        sitting.environment.get(name) == environment.get(name)
        for sitting in record.sittings
        for name in _EQUAL
    )


def _text(result: RunResult) -> str:
    return str(result.run.start.inputs[DATA])


def _key(tables: Mapping[str, Any], text_sha256: str) -> str:
    """Return what two runs are the same by: the text counts by its content, not by its path."""
    data = {**tables["data"], "corpus": text_sha256}
    return json.dumps({**tables, "data": data}, sort_keys=True)
