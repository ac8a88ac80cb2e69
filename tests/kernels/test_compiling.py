"""Compiling the CPU loops takes long, so the first step says when it happens."""

import pytest

from sinkgd.kernels.cpu import launch


@pytest.fixture
def loops(monkeypatch):
    """Loops of which nothing is in memory yet, and which take no time."""
    monkeypatch.setattr(launch, "_loops", lambda: {"update": 7})
    launch._announced_loops.cache_clear()
    yield
    launch._announced_loops.cache_clear()


@pytest.mark.parametrize(
    ("shared", "words"),
    [(True, "once; they are kept in "), (False, "in every process; set NUMBA_CACHE_DIR to a")],
)
def test_the_first_step_says_that_it_compiles(loops, monkeypatch, capsys, shared, words):
    monkeypatch.setattr(launch, "loops_are_compiled", lambda: False)
    monkeypatch.setattr(launch, "cache_is_shared", lambda: shared)
    for _ in range(2):
        assert launch._announced_loops() == {"update": 7}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sinkgd: compiling the CPU loops, which takes")
    assert words in line


def test_nothing_is_said_of_loops_in_the_cache(loops, monkeypatch, capsys):
    monkeypatch.setattr(launch, "loops_are_compiled", lambda: True)
    launch._announced_loops()
    assert capsys.readouterr().err == ""
