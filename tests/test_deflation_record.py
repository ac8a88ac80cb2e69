"""The table of benchmarks/deflation is what its records say."""

import re
import statistics
from pathlib import Path

import pytest

from sinkgd.lab.results import Run

FOLDER = Path(__file__).parents[1] / "benchmarks" / "deflation"
RULES = {"next direction": "next", "root-mean-square of the others": "mean"}
ROW = re.compile(r"^\| (\w[\w -]+) \| (\d+) \| ([\d.]+) \| ([\d., ]+) \|([\d.±* ]*)\|$", re.M)
ROWS = ROW.findall((FOLDER / "README.md").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:3]))
def test_a_row_is_the_mean_of_its_runs_and_half_their_range(row):
    rule, directions, rate, losses, mean = row
    files = sorted(FOLDER.glob(f"{RULES[rule]}-{directions}-rate-{rate}-seed-*.jsonl"))
    ends = [Run.read(path).evaluations[-1].val_loss for path in files]
    assert losses == ", ".join(f"{end:.3f}" for end in ends)
    if len(ends) > 1:
        half_range = (max(ends) - min(ends)) / 2
        assert mean.strip(" *") == f"{statistics.fmean(ends):.3f} ± {half_range:.3f}"


def test_every_row_is_checked():
    assert len(ROWS) == 10
