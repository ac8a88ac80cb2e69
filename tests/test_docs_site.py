"""The documents build without a warning, and every recorded study's page is on the site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_study(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = (site / "experiments.html").read_text(encoding="utf-8")
    records = sorted(path.name for path in (ROOT / "benchmarks/studies").iterdir())
    assert len(records) > 12
    for name in records:
        assert f'href="studies/{name}.html"' in table
        kept = ROOT / "benchmarks/studies" / name / "report.html"
        assert (site / "studies" / f"{name}.html").read_bytes() == kept.read_bytes()

    functions = (site / "reference/functions.html").read_text(encoding="utf-8")
    assert "check_num_iters" not in functions  # the function, not the module of its name
    returned = functions.partition("Returns:")[2].partition("</table>")[0]
    assert returned.count("<tr") == 2  # a description is one, however many lines
    assert re.search(r'<a href="https://arxiv.org/abs/2502.06742"', functions)
