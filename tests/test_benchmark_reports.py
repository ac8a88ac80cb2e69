"""The verdicts of the scripts in benchmarks/tasks and benchmarks/directions follow from records."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASKS = sorted(BENCHMARKS.glob("tasks/*/record.jsonl"))
REPORTS = {
    record.parent.name: ["tasks/report.py", record.parent.name, record] for record in TASKS
} | {"directions": ["directions/directions_report.py", BENCHMARKS / "directions/record.jsonl"]}


@pytest.mark.parametrize("name", REPORTS)
def test_a_verdict_is_made_again_from_its_record(name, tmp_path):
    script, *arguments = REPORTS[name]
    subprocess.run([sys.executable, BENCHMARKS / script, *arguments, tmp_path], check=True)
    again = (tmp_path / "verdict.md").read_text(encoding="utf-8")
    assert again == (arguments[-1].parent / "verdict.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size > 10_000
