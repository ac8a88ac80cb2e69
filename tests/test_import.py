"""``import sinkgd`` is light: torch, and nothing that torch has not loaded already."""

import inspect
import re
import subprocess
import sys

import pytest
import torch

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


def test_contrib_waits_until_a_program_asks_for_one_of_its_names():
    code = """
import sys, sinkgd
def loaded(): return "sinkgd.contrib" in sys.modules
print(loaded(), "SPAM" in dir(sinkgd), loaded(), sinkgd.SPAM.__name__, loaded())
"""
    assert run(code) == "False True False SPAM True"


def test_type_checkers_see_the_names_that_programs_get():
    source = inspect.getsource(sinkgd)
    shown = re.findall(r"^    from sinkgd\.contrib\.(\w+) import (\w+) as \2$", source, re.M)
    assert {name: module for module, name in shown} == sinkgd._IN_CONTRIB


def test_contrib_is_an_attribute_of_the_package():
    assert run("import sinkgd; print(sinkgd.contrib.__name__)") == "sinkgd.contrib"


def test_a_group_may_name_a_method_of_contrib():
    code = """
import torch, sinkgd
weight = torch.nn.Parameter(torch.ones(4, 6))
weight.grad = torch.ones(4, 6)
sinkgd.SinkGD([{"params": [weight], "algorithm": "sage", "lr": 0.5}]).step()
print(bool((weight != 1).all()))
"""
    assert run(code) == "True"


def test_a_pickled_optimizer_finds_its_methods_in_a_new_process(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4, 6))
    groups = [{"params": [weight], "algorithm": "sage", "lr": 0.5}]
    torch.save(sinkgd.SinkGD(groups), tmp_path / "optimizer.pt")
    code = f"""
import torch
optimizer = torch.load({str(tmp_path / "optimizer.pt")!r}, weights_only=False)
weight = optimizer.param_groups[0]["params"][0]
weight.grad = torch.ones(4, 6)
optimizer.step()
print(bool((weight != 1).all()))
"""
    assert run(code) == "True"


def test_a_star_imports_the_names_of_contrib_too():
    assert run("from sinkgd import *; print(SinkGD.__name__, SPAM.__name__)") == "SinkGD SPAM"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SinkGDX'"):
        sinkgd.SinkGDX  # noqa: B018
