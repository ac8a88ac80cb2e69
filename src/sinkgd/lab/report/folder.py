"""The runs of a folder: one results file each, in the folder itself or one level below."""

from pathlib import Path

from sinkgd.lab.results import RESULTS_FILE, Run


class ReportError(ValueError):
    """Runs that cannot be reported, with the remedy."""


def read_runs(folder: Path) -> list[Run]:
    """Read ``folder/run.jsonl`` and every ``folder/*/run.jsonl``, sorted by path.

    Raises:
        ReportError: If the folder is missing or holds no results.
        ResultsError: If a results file is damaged; no run is left out in silence.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; give the one that `sinkgd compare` wrote to")
    paths = sorted([*folder.glob(RESULTS_FILE), *folder.glob(f"*/{RESULTS_FILE}")])
    if not paths:
        raise ReportError(
            f"{folder} holds no runs: neither {RESULTS_FILE} nor */{RESULTS_FILE} exists there. "
            f"`sinkgd compare --out {folder}` makes some"
        )
    return [Run.read(path) for path in paths]
