"""Ratios of rounds that spread, or of a loaded machine, are warned of and are no headline."""

from dataclasses import replace

import pytest

from lab.bench.synthetic import ENVIRONMENT, step_record, workload
from lab.report.test_page import Parsed
from sinkgd.lab.bench.page import step_page
from sinkgd.lab.bench.quartiles import Quartiles
from sinkgd.lab.bench.step.doubts import LOAD, warnings_of


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
    assert bool(warnings_of(record)) == doubtful
    assert ("Rounds spread widely on the matrices of llama-1b-layer" in text) == doubtful


def test_the_headline_is_of_the_first_workload_that_can_be_trusted():
    record = step_record(spread_out(workload(), width=0.5), workload("llama-60m"))
    assert "On the matrices of llama-60m a step of SinkGD" in Parsed(step_page(record)).text


@pytest.mark.parametrize(("load", "loaded"), [(None, False), (0.1, False), (1.5, True)])
def test_a_loaded_machine_is_said(load, loaded):
    environment = ENVIRONMENT if load is None else {**ENVIRONMENT, LOAD: load}
    record = step_record(workload(), environment=environment)
    text = Parsed(step_page(record)).text
    assert ("the machine was busy" in text) == loaded
    assert any("load of 1.50 a core" in one for one in warnings_of(record)) == loaded
