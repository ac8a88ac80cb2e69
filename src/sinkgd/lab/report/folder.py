"""The runs of a folder: one results file each, in the folder itself or one level below.

A folder of records, such as `benchmarks/demo` has, holds results files under other names.
"""

from pathlib import Path

from sinkgd.lab.results import RESULTS_FILE, Run


class ReportError(ValueError):
    """Runs that cannot be reported, with the remedy."""


def read_runs(folder: Path) -> list[Run]:
    """Read ``folder/run.jsonl`` and every ``folder/*/run.jsonl``, sorted by path.

    Where there is none of these, every ``folder/*.jsonl``; of a file, that file alone.

    Raises:
        ReportError: If the folder is missing or holds no results.
        ResultsError: If a results file is damaged; no run is left out in silence.
    """
    if folder.is_file():
        return [Run.read(folder)]
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; give the one that `sinkgd compare` wrote to")
    paths = sorted([*folder.glob(RESULTS_FILE), *folder.glob(f"*/{RESULTS_FILE}")])
    paths = paths or sorted(folder.glob("*.jsonl"))
    if not paths:
        inner = sorted(path.name for path in folder.iterdir() if any(path.glob("*.jsonl")))
        hint = f"`sinkgd compare --out {folder}` makes some"
        if inner:
            hint = f"its folders {', '.join(inner)} hold some; name one of them"
        raise ReportError(
            f"{folder} holds no runs: neither {RESULTS_FILE} nor */{RESULTS_FILE} nor *.jsonl "
            f"exists there; {hint}"
        )
    return [Run.read(path) for path in paths]
