"""The recorded studies: their verdicts follow from their numbers, and each has its small page."""

from pathlib import Path

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.experiments.studies import QUESTIONS

RECORDS = Path(__file__).parents[3] / "benchmarks/studies"


def test_every_study_has_a_record():
    assert set(QUESTIONS) <= {path.name for path in RECORDS.iterdir()}


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDS.iterdir()))
def test_a_record_says_what_its_numbers_say(tmp_path, name):
    record = RECORDS / name
    assert main(["report", str(record), "--cdn", "--out", str(tmp_path / "page.html")]) == 0
    verdict = (record / "verdict.md").read_text(encoding="utf-8")
    assert (tmp_path / "verdict.md").read_text(encoding="utf-8") == verdict
    page = (record / "report.html").read_text(encoding="utf-8")
    assert 'src="https://cdn.plot.ly/' in page
    assert len(page) < 500_000
    for kept in record.iterdir():
        assert "/home/" not in kept.read_text(encoding="utf-8")


def test_a_study_takes_no_baseline(capsys):
    assert main(["report", str(RECORDS / "lens"), "--baseline", "adamw"]) == 2
    assert "baseline is 'adamw', but" in capsys.readouterr().err
