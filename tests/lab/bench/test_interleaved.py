"""Contenders are timed in every position of a round; ratios and floors are of the same round."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from lab.bench.synthetic import GB, workload
from sinkgd.lab.bench import interleaved
from sinkgd.lab.bench.interleaved import (
    Pace,
    fastest,
    floor_seconds,
    probe_calls,
    probes,
    quartiles,
    ratios,
    rounds_for,
    summarize_bandwidth,
    time_interleaved,
    williams_order,
)
from sinkgd.lab.bench.workloads import random_problem

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_contender_has_every_place_equally_often(count):
    names = [str(i) for i in range(count)]
    places = Counter(
        (place, name) for i in range(count) for place, name in enumerate(williams_order(names, i))
    )
    assert set(places.values()) == {1}
    assert len(places) == count**2


@pytest.mark.parametrize("count", [2, 4, 5, 7])
def test_every_contender_follows_every_other_equally_often(count):
    names = [str(i) for i in range(count)]
    followed = Counter(
        pair for i in range(2 * count) for pair in pairwise(williams_order(names, i))
    )
    assert len(followed) == count * (count - 1)
    assert set(followed.values()) == {2}


def test_a_slow_contender_has_few_turns_spread_over_the_rounds():
    pace = Pace(rounds=20, seconds=10.0)
    assert sorted(rounds_for(2.0, pace)) == [0, 4, 8, 12, 16]
    assert len(rounds_for(100.0, pace)) == interleaved.MIN_TURNS
    assert len(rounds_for(0.001, pace)) == 20
    assert rounds_for(100.0, Pace(rounds=2, seconds=1.0)) == {0, 1}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the contenders move."""
    now = [0.0]
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: now[0])
    return now


def test_turns_are_timed_round_by_round_after_a_warm_up(clock):
    called = []

    def contender(name, seconds):
        def call():
            called.append(name)
            clock[0] += seconds

        return call

    told = []
    contenders = {"quick": contender("quick", 1.0), "slow": contender("slow", 8.0)}
    seconds = time_interleaved(contenders, Pace(rounds=6, seconds=6.0), CPU, told.append)
    assert seconds == {"quick": (1.0,) * 6, "slow": (8.0, None, 8.0, None, 8.0, None)}
    assert called[:3] == ["quick", "quick", "slow"]  # what is slow is warmed up once
    assert Counter(called[3:]) == {"quick": 6, "slow": 3}
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_short_calls_are_repeated_and_averaged(clock):
    calls = []

    def call():
        calls.append(1)
        clock[0] += 0.25

    pace = Pace(rounds=3, seconds=100.0, min_turn_seconds=1.0)
    assert time_interleaved({"short": call}, pace, CPU, lambda _: None) == {"short": (0.25,) * 3}
    assert len(calls) == 3 + 3 * 4


def test_the_reference_has_a_turn_in_every_round(clock):
    def call():
        clock[0] += 50.0

    pace = Pace(rounds=5, seconds=1.0)
    seconds = time_interleaved({"a": call, "b": call}, pace, CPU, lambda _: None, reference="a")
    assert seconds == {"a": (50.0,) * 5, "b": (50.0, 50.0, None, 50.0, None)}


def test_a_busy_moment_in_the_warm_up_is_not_taken_for_slowness(clock):
    durations = iter([0.4, 0.1, 0.1] + [0.1] * 9)

    def call():
        clock[0] += next(durations)

    seconds = time_interleaved({"a": call}, Pace(rounds=9, seconds=2.0), CPU, lambda _: None)
    assert None not in seconds["a"]


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
