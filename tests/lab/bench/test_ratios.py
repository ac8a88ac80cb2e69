"""Ratios are taken within a round; a floor is bytes at the best bandwidth of the same round."""

import pytest
import torch

from lab.bench.synthetic import GB, workload
from sinkgd.lab.bench.interleaved import (
    fastest,
    floor_seconds,
    probe_calls,
    probes,
    quartiles,
    ratios,
    summarize_bandwidth,
)
from sinkgd.lab.bench.workloads import random_problem


def test_a_ratio_is_free_of_what_slows_a_whole_round():
    layer = workload()  # rounds slow down by 1, 2 and 4
    ours = layer.timing("sinkgd-cpu")
    assert ours.step_seconds.lower < ours.step_seconds.upper
    for figure in (ours.of_adamw.lower, ours.of_adamw.median, ours.of_adamw.upper):
        assert figure == pytest.approx(1.1)


def test_rounds_without_a_turn_of_both_are_left_out():
    assert ratios([3.0, None, 8.0], [1.0, 2.0, None]) == [3.0]


def test_one_figure_is_its_own_quartiles():
    assert quartiles([2.0]) == quartiles([2.0, 2.0, 2.0])


def test_a_floor_is_bytes_at_the_fastest_median():
    slow = summarize_bandwidth("slow", 100, [1.0, 1.0, 0.01])
    fast = summarize_bandwidth("fast", 300, [2.0, 2.0, None])
    assert fastest([slow, fast]) is fast
    assert fast.bytes_per_second.median == 150
    assert floor_seconds(600, fast) == (4.0, 4.0, None)


def test_the_floor_of_l_iterations_is_l_plus_three_passes():
    ours = workload().timing("sinkgd-cpu")
    assert ours.floor_bytes == 8 * GB
    assert ours.of_floor.median == pytest.approx(1.1 / (8 / 7))
    assert ours.floor_of_adamw == pytest.approx(8 / 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_probe_runs_on_odd_shapes_and_leaves_gradients_alone(dtype):
    problem = random_problem([(3, 5), (4, 8), (7,)], dtype, torch.device("cpu"))
    before = [grad.clone() for grad in problem.grads]
    for call in probe_calls(probes(problem.device), problem).values():
        call()
    assert all(map(torch.equal, before, problem.grads))
