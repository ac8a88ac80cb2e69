"""``pytest -m gpu`` on the test files that need no laboratory."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from contact.items import Item, Row, Section, Setting

ROOT = Path(__file__).parents[3]
OUTCOMES = ("passed", "failed", "skipped", "error", "errors")


def section() -> Section:
    """Return the section."""
    return Section("tests", 40, (Item("pytest -m gpu", run_tests, 200),), timed=False)


def files() -> list[str]:
    """Return the test files with a test that is marked ``gpu``, except the laboratory's."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tests/lab/") and "mark.gpu" in path.read_text():
            found.append(name)
    return found


def command(names: list[str], *more: str) -> list[str]:
    """Return the command, which needs none of the plugins whose options pyproject.toml sets."""
    parallel = importlib.util.find_spec("xdist") is not None
    has_timeout = importlib.util.find_spec("pytest_timeout") is not None
    return [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-rfE"),
        *("-p", "no:cacheprovider", "-W", "default"),
        *("-o", "addopts=--strict-markers --import-mode=importlib"),
        *(("-o", "timeout=120") if has_timeout else ()),
        *(("-n", "4") if parallel else ()),  # each test compiles kernels of its own
        *more,
        *names,
    ]


def run_tests(setting: Setting) -> Iterator[Row]:
    """Run the tests, and return how many passed and which did not."""
    names = files()
    limit = max(5.0, setting.left())
    try:
        answer = subprocess.run(
            command(names),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout if isinstance(error.stdout, bytes) else b""
        yield {"status": "timeout", "files": names, "tail": said.decode(errors="replace")[-2000:]}
        return
    yield {
        "status": "ok" if answer.returncode == 0 else "wrong",
        "exit": answer.returncode,
        "files": names,
        **counts(answer.stdout),
        "failures": re.findall(r"^(?:FAILED|ERROR) (.*)$", answer.stdout, re.MULTILINE),
        "tail": (answer.stdout + answer.stderr)[-6000:],
    }


def counts(text: str) -> dict[str, int]:
    """Return the numbers of pytest's last line."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    found = re.findall(r"(\d+) (\w+)", last)
    return {outcome: int(number) for number, outcome in found if outcome in OUTCOMES}
