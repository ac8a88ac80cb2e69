"""A process-wide default dtype or device reaches nothing of ours: the same bits under each."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DEFAULTS = ["bfloat16", "float16", "float64", "meta", "cpu"]


@cache
def bits(kind: str, default: str | None = None, **environment: str) -> dict[str, str]:
    """Run `every_step` in a process of its own."""
    command = [sys.executable, "every_step.py", kind, *([default] if default else [])]
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if kind == "triton":
        own["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        command, cwd=TESTS, env=own, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, str] = json.loads(done.stdout)
    return found


def assert_alike(found: dict[str, str], expected: dict[str, str]) -> None:
    assert found.keys() == expected.keys()
    other = {name: bits for name, bits in found.items() if bits != expected[name]}
    assert not other, f"{len(other)} of {len(found)} differ: {dict(list(other.items())[:10])}"


# A walk takes several seconds; these stand for all in the fast part of the suite.
FAST = {("library", "bfloat16")}


def _combinations():
    return [
        pytest.param(kind, default, marks=() if (kind, default) in FAST else pytest.mark.slow)
        for kind in ("library", "counts", "compiled", "triton", "lab")
        for default in DEFAULTS
    ]


@pytest.mark.parametrize(("kind", "default"), _combinations())
def test_a_default_changes_no_bit(kind, default):
    assert_alike(bits(kind, default), bits(kind))


@pytest.mark.parametrize(
    "kind", ["library", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("counts", "lab"))]
)
def test_without_a_default_nothing_fails(kind):
    failed = {name: bits for name, bits in bits(kind).items() if ": " in bits}
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("default", DEFAULTS)
def test_no_write_leaves_its_buffer(default):
    """glibc and Python look at the guards of every block, and end the process where one broke."""
    checked = bits("library", default, MALLOC_CHECK_="3", PYTHONMALLOC="debug", **_checks())
    assert_alike(checked, bits("library"))


def _checks() -> dict[str, str]:
    """Since glibc 2.34 the checks lie in a library of their own."""
    found = sorted(Path("/lib").rglob("libc_malloc_debug.so.0"))
    return {"LD_PRELOAD": str(found[0])} if found else {}
