"""A step passes few files, and the page on how it works names them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "house" / "walk.py"
# Files, and returns to a file, as counted when this was written. Lower them; raise them only if a
# step must do more, as it did when it began to give gradients the placements of their parameters.
MOST = {"plain": (13, 10), "deflated": (23, 89)}


@pytest.fixture(scope="module")
def walk():
    spec = importlib.util.spec_from_file_location("walk", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", MOST)
def test_a_step_passes_no_more_files_than_before(walk, kind):
    found = walk.walk_of(kind)
    files, returns = MOST[kind]
    assert len(found.files) <= files
    assert found.returns <= returns


@pytest.mark.slow
def test_a_sharded_step_passes_no_more_files_than_before():
    printed = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"^(sharded(?:, deflated)?) +(\d+)", printed, re.MULTILINE))
    assert int(found["sharded"]) <= 21
    assert int(found["sharded, deflated"]) <= 26


def test_the_page_on_how_it_works_names_the_files_of_a_plain_step(walk):
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = page.partition("## Follow a step through the code")[2].split("\n\n- **")[0]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", table)
    passed = walk.walk_of("plain").files
    # The page leaves out the setting of precision, and details of the compiled loops' launch.
    details = [one for one in passed if one == "precision.py" or one.startswith("kernels/cpu/")]
    assert {*passed} - {*details} <= {*named}
    assert {one for one in named if "/" in one} <= {*passed}
