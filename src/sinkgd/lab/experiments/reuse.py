"""Reuse runs of grids that neighboring studies have in common, so that each is trained once.

In one environment, a run's configuration determines its losses to the bit, and losses are all that
a grid needs. Reported runs also have times, which depend on the machine's other work, so every
study trains its own.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from sinkgd.lab.experiments.studies.scale import is_on_paper
from sinkgd.lab.experiments.study import Task
from sinkgd.lab.experiments.study_record import STUDY_FILE, RunResult, StudyRecord
from sinkgd.lab.results import ResultsError
from sinkgd.lab.train.config import RunConfig, as_tables
from sinkgd.lab.train.identity import DATA, knows_its_text

# The parts of an environment that losses depend on.
_EQUAL = ("sinkgd", "torch", "cpu", "threads", "device")


@dataclass(frozen=True)
class ReusableRuns:
    """Finished runs of other studies' grids, by their configurations."""

    results: Mapping[str, RunResult]

    @classmethod
    def collect(
        cls, folder: Path, environment: Mapping[str, Any], say: Callable[[str], None]
    ) -> Self:
        """Collect the runs of studies in the folders next to a study's.

        Args:
            folder: Folder of the study.
            environment: This process's environment, from `describe_environment`.
            say: Called with a line about each neighbor that cannot be read.
        """
        found: dict[str, RunResult] = {}
        for path in sorted(folder.absolute().parent.glob(f"*/{STUDY_FILE}")):
            if path.parent == folder.absolute() or not path.is_file() or is_on_paper(path):
                continue
            try:
                record = StudyRecord.read(path)
            except (OSError, ResultsError) as error:
                say(f"runs of a neighboring study are not reused: {error}")
                continue
            if _alike(record, environment):
                for result in record.runs.values():
                    if (
                        result.tuning
                        and result.run.finished
                        and not result.study
                        and knows_its_text(result.run.start)
                    ):
                        reused = replace(result, study=record.plan["study"])
                        found[_key(result.run.start.config, _text(result))] = reused
        return cls(found)

    def find(self, task: Task, config: RunConfig, text_sha256: str) -> RunResult | None:
        """Return the result of an equal run of another study.

        Args:
            task: The run that is needed.
            config: Its resolved configuration.
            text_sha256: Hash of the shards that it would be trained on.

        Returns:
            The result under the task's names; None for a reported run, and if there is none.
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
    """Whether all recorded sessions of a study had this environment; False if none is recorded."""
    return bool(record.sessions) and all(
        session.environment.get(name) == environment.get(name)
        for session in record.sessions
        for name in _EQUAL
    )


def _text(result: RunResult) -> str:
    return str(result.run.start.inputs[DATA])


def _key(tables: Mapping[str, Any], text_sha256: str) -> str:
    """Return the key of a configuration; it has the text's hash in place of its path."""
    data = {**tables["data"], "corpus": text_sha256}
    return json.dumps({**tables, "data": data}, sort_keys=True)
