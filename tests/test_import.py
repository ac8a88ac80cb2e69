"""``import sinkgd`` is light: torch, and nothing that torch has not loaded already."""

import subprocess
import sys

import sinkgd


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_loads_nothing_but_itself():
    code = """
import sys, torch
before = set(sys.modules)
import sinkgd
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    assert run(code) == "['sinkgd']"


def test_the_version_is_the_distributions():
    assert run("from importlib.metadata import version; print(version('sinkgd'))") == (
        sinkgd.__version__
    )
