"""Targets are judged by the figures of a record, and say where there is none."""

import pytest

from lab.bench.synthetic import STEPS, memory_use, step_record, workload
from sinkgd.lab.bench.step_record import TARGETS, FirstCall, evaluate


def results(record):
    return {result.name: result for result in evaluate(record)}


@pytest.mark.parametrize(
    ("name", "measured", "met", "stretch_met"),
    [
        ("llama-1b-layer, float32, L=5, × AdamW", 1.1, True, False),
        ("llama-1b-layer, float32, L=1, × AdamW", 0.6, True, False),
        ("llama-1b-layer, float32, L=5, faster than the public loop", 40.0, True, False),
        ("llama-1b-layer, float32, L=5, × its floor", 1.1 * 7 / 8, True, True),
        ("llama-60m, bfloat16, L=5, × AdamW", 1.1, False, False),
        ("all of llama-60m, hybrid step, float32, × AdamW", 0.9, True, False),
        ("scratch of a steady step, × (1 MiB + 4(m+n) B per thread)", 0.25, True, None),
        ("relative error against float64, float32 gradients", 2e-6, True, None),
        ("first call, compile included, warm cache", 0.5, True, None),
    ],
)
def test_a_target_is_judged_by_its_figure(name, measured, met, stretch_met):
    record = step_record(
        workload(), workload("llama-60m", "bfloat16"), workload("llama-60m-hybrid")
    )
    result = results(record)[name]
    assert result.measured == pytest.approx(measured)
    assert (result.met, result.stretch_met) == (met, stretch_met)


def test_a_small_matrix_costs_its_time_less_its_bytes():
    # 2,000 matrices: a step of 10 ms at the median, of which the floor is 8/7 · 2 ms
    steps = {**STEPS, "sinkgd-cpu": (0.005, 8)}
    small = workload("many-small", steps=steps, matrices=2000)
    name = "2,000 matrices of 64×64, time per matrix above the floor"
    floor = small.timing("sinkgd-cpu").of_floor.median
    result = results(step_record(small))[name]
    assert result.measured == pytest.approx((10_000 - 10_000 / floor) / 2000)
    assert result.unit == "µs"


def test_what_was_not_measured_is_neither_met_nor_missed():
    record = step_record(first_calls=(), accuracies=(), scratch=())
    assert len(TARGETS) == 12
    for result in evaluate(record):
        assert (result.measured, result.met, result.stretch_met) == (None, None, None)


def test_a_target_just_missed_is_missed():
    record = step_record(
        first_calls=(FirstCall("cpu", 1.0, (0.1, 1.51)),),
        scratch=(memory_use("sinkgd-cpu", held=900, transient=101),),
    )
    found = results(record)
    assert found["first call, compile included, warm cache"].met is False
    scratch = "scratch of a steady step, × (1 MiB + 4(m+n) B per thread)"
    assert found[scratch].met is False
