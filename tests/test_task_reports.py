"""The verdicts of the scripts in benchmarks/tasks follow from their records."""

import subprocess
import sys
from pathlib import Path

import pytest

TASKS = Path(__file__).parents[1] / "benchmarks/tasks"


@pytest.mark.parametrize(
    "record", sorted(TASKS.glob("*/record*.jsonl")), ids=lambda p: p.parent.name
)
def test_a_verdict_is_made_again_from_its_record(record, tmp_path):
    command = [sys.executable, TASKS / "report.py", record.parent.name, record, tmp_path]
    subprocess.run(command, check=True)
    again = (tmp_path / "verdict.md").read_text(encoding="utf-8")
    assert again == (record.parent / "verdict.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size > 10_000
