"""Ratios of rounds that spread, or of a loaded machine, are warned of and are no headline."""

from dataclasses import replace

import pytest

from lab.bench.synthetic import ENVIRONMENT, kernels_record, step_record, workload
from lab.report.test_page import Parsed
from sinkgd.lab.bench import bench_loop as loop
from sinkgd.lab.bench.bench_kernels import kernels_page, kernels_warnings
from sinkgd.lab.bench.interleaved import LOAD, Quartiles
from sinkgd.lab.bench.step_report import step_page, step_warnings


def spread_out(found, *, width):
    timings = [
        replace(one, of_adamw=Quartiles(1.1 - width / 2, 1.1, 1.1 + width / 2))
        for one in found.timings
    ]
    return replace(found, timings=tuple(timings))


@pytest.mark.parametrize(("width", "doubtful"), [(0.1, False), (0.5, True)])
def test_rounds_that_spread_widely_give_no_headline(width, doubtful):
    record = step_record(spread_out(workload(), width=width))
    text = Parsed(step_page(record)).text
    assert ("1.10 times as long" in text) != doubtful
    assert ("No ratio is given: the rounds spread too widely." in text) == doubtful
    assert bool(step_warnings(record)) == doubtful
    assert ("Rounds spread widely on the matrices of llama-1b-layer" in text) == doubtful


def test_the_headline_is_of_the_first_workload_that_can_be_trusted():
    record = step_record(spread_out(workload(), width=0.5), workload("llama-60m"))
    assert "On the matrices of llama-60m a step of SinkGD" in Parsed(step_page(record)).text


@pytest.mark.parametrize(("width", "doubtful"), [(0.1, False), (0.5, True)])
def test_kernels_that_spread_widely_are_named(width, doubtful):
    record = kernels_record()
    share = Quartiles(0.8 - width / 2, 0.8, 0.8 + width / 2)
    cases = [
        replace(case, timings=tuple(replace(one, share=share) for one in case.timings))
        for case in record.cases
    ]
    record = replace(record, cases=tuple(cases))
    assert bool(kernels_warnings(record)) == doubtful
    case = record.cases[0]
    wanted = f"on {case.case}, {case.dtype}: {case.timings[0].backend}: "
    assert (wanted in Parsed(kernels_page(record)).text) == doubtful


@pytest.mark.parametrize(("seconds", "doubtful"), [((2.0, 2.1, 2.0), 0), ((2.0, 4.0, 9.0), 1)])
def test_loops_that_spread_widely_are_named(seconds, doubtful):
    found = loop._wide({loop.BARE: [1.0, 1.0, 1.0], "own": [*seconds]})
    assert found == ["own"] * doubtful


@pytest.mark.parametrize(("load", "loaded"), [(None, False), (0.1, False), (1.5, True)])
def test_a_loaded_machine_is_said(load, loaded):
    environment = ENVIRONMENT if load is None else {**ENVIRONMENT, LOAD: load}
    record = step_record(workload(), environment=environment)
    text = Parsed(step_page(record)).text
    assert ("the machine was busy" in text) == loaded
    assert any("load of 1.50 per core" in one for one in step_warnings(record)) == loaded
