"""The environment names what a figure depends on."""

import subprocess
from pathlib import Path

import pytest
import torch

import sinkgd
from sinkgd.lab.train import machine
from sinkgd.lab.train.machine import commit, describe_environment, installed_version, source_hash


def test_versions_device_and_threads_are_there():
    found = describe_environment(torch.device("cpu"))
    assert found["sinkgd"] == sinkgd.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["cpu"]


@pytest.mark.parametrize(
    ("flags", "further"),
    [("avx2 fma", ""), ("avx512f avx512_bf16 amx_tile amx_bf16", ", avx512_bf16, amx_bf16")],
)
def test_processors_of_one_name_are_told_apart_by_their_instructions(
    monkeypatch, tmp_path, flags, further
):
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}\n", encoding="utf-8"
    )
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    capability = torch.backends.cpu.get_cpu_capability()
    assert machine.cpu_name() == f"AMD EPYC, {capability}{further}"


def test_an_absent_package_has_no_version():
    assert installed_version("no-such-package-anywhere") is None


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ("optim/step.py", True),
        ("lab/train/loop.py", True),
        ("lab/report/page.py", False),
        ("lab/experiments/studies/one.py", False),
    ],
)
def test_the_hash_of_the_source_is_of_what_decides_the_losses(tmp_path, changed, differs):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        for name in ("optim/step.py", "lab/train/loop.py", "lab/report/page.py"):
            path = folder / name
            path.parent.mkdir(parents=True)
            path.write_text("x = 1\n", encoding="utf-8")
    (after / changed).parent.mkdir(parents=True, exist_ok=True)
    (after / changed).write_text("x = 2\n", encoding="utf-8")
    assert (source_hash(before) != source_hash(after)) == differs
    assert describe_environment(torch.device("cpu"))["source"] == source_hash()


def use_source(monkeypatch, folder: Path) -> Path:
    source = folder / "__init__.py"
    source.write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(machine.sinkgd, "__file__", str(source))
    return source


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_the_commit_is_that_of_the_code_and_says_when_it_was_changed(monkeypatch, tmp_path):
    source = use_source(monkeypatch, tmp_path)
    git(tmp_path, "init", "--quiet")
    assert commit() is None  # not yet part of the repository around it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    clean = commit()
    assert clean is not None
    assert len(clean) == 40
    source.write_text("x = 2\n", encoding="utf-8")
    assert commit() == f"{clean}-dirty"


def test_installed_code_has_no_commit(monkeypatch, tmp_path):
    use_source(monkeypatch, tmp_path)
    assert commit() is None
