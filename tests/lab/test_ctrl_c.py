"""Ctrl-C at any moment ends the program with one line and the exit code 130."""

import signal
import subprocess
import sys
import time

import pytest

# As the console script, which says when its first line runs.
SCRIPT = """\
import sys
print("started", flush=True)
from _sinkgd_cli import main
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored():
    """A shell that starts the tests in the background has them and their children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# As `python -m`, which imports the packages of the module before the module.
MODULE = """\
import os, sys
print("started", flush=True)
os.execv(sys.executable, [sys.executable, "-m", "sinkgd.lab", *sys.argv[1:]])
"""


def interrupted(
    after_seconds: float, *arguments: str, sent=signal.SIGINT, program=SCRIPT
) -> tuple[int, str]:
    """Return the exit code and what was said."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(after_seconds)
        process.send_signal(sent)
        _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize(
    "after_seconds",
    [0.1, 0.6, 1.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.3, 1.0, 2.2, 3.0))],
)
def test_it_is_one_line_in_the_first_seconds(tmp_path, monkeypatch, after_seconds):
    monkeypatch.setenv("SINKGD_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "run")
    code, said = interrupted(after_seconds, "train", "--out", out, "--data.corpus", "sotu")
    lines = [
        line for line in said.splitlines() if not line.startswith(("training a", "tokenizing"))
    ]
    assert (code, lines) == (130, ["error: stopped by Ctrl-C"])


@pytest.mark.parametrize("after_seconds", [0.2, 0.6])
def test_it_is_one_line_where_the_module_is_run(after_seconds):
    # Python itself takes Ctrl-C in the first tenth of a second, before it looks for the module.
    code, said = interrupted(after_seconds, "doctor", program=MODULE)
    assert (code, said) == (130, "error: stopped by Ctrl-C\n")


def test_a_package_that_imports_the_library_keeps_its_ctrl_c(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("import sinkgd")
    show = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (package / "__main__.py").write_text(show)
    command = [sys.executable, "-m", "package", "sinkgd.lab"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "True\n"


def test_sigterm_in_the_first_second_ends_a_comparison_with_its_code(tmp_path):
    code, said = interrupted(0.3, "compare", "--out", str(tmp_path), sent=signal.SIGTERM)
    assert (code, said) == (-signal.SIGTERM, "")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], *(pytest.param([a], marks=pytest.mark.slow) for a in ("doctor", "--help"))],
)
def test_the_console_script_is_the_program(arguments):
    command = [sys.executable, "-c", SCRIPT.replace('print("started", flush=True)', ""), *arguments]
    ours = subprocess.run(command, capture_output=True, text=True, check=True)
    module = [sys.executable, "-m", "sinkgd.lab.cli", *arguments]
    assert ours.stdout == subprocess.run(module, capture_output=True, text=True, check=True).stdout
