"""The wheel works where there is torch and nothing else, and the README's examples run there."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def examples(page):
    """The Python blocks of a page that need the library and one process alone."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    others = ("transformers", "torch.distributed", "sinkgd.lab")
    return [block for block in blocks if not any(name in block for name in others)]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    pins = str(ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", pins, str(wheel))
    return python


def test_it_carries_the_page_and_the_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sinkgd/py.typed" in names
    for part in ("page.html", "page.css", "page.js"):
        assert f"sinkgd/lab/report/{part}" in names


def test_torch_is_all_that_came_along(empty_environment):
    installed = run(empty_environment, "-m", "pip", "list", "--format", "freeze")
    for name in ("numpy", "rich", "tokenizers", "numba", "transformers"):
        assert f"\n{name}==" not in installed


@pytest.mark.parametrize("page", ["README.md", "docs/use.md", "docs/norms.md"])
def test_the_examples_run(empty_environment, tmp_path, page):
    blocks = examples(ROOT / page)
    assert blocks
    script = tmp_path / "example.py"
    for block in blocks:
        script.write_text(block)
        run(empty_environment, "-W", "ignore", str(script), cwd=tmp_path)


def test_the_command_says_what_is_missing(empty_environment):
    done = subprocess.run(
        [empty_environment, "-m", "sinkgd.lab.cli", "compare"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "in a clone of the repository, run: pip install '.[lab]'" in done.stderr
    assert "Traceback" not in done.stderr
