"""Grids that go on past their edges: which points are tried, and when the search ends."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.experiments.synthetic_study import made_up_run
from sinkgd.lab.experiments.arms import Arm, arm_as_json, arm_from_json, check_arms
from sinkgd.lab.experiments.scheduler import Scheduler
from sinkgd.lab.experiments.selection import select_arms
from sinkgd.lab.experiments.studies import STUDIES, find_study
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.experiments.study_record import RunResult, StudyRecord
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.train import ConfigError

LR, MATRIX_LR = "optimizer.lr", "optimizer.matrix_lr"
GRID = {LR: (0.08,), MATRIX_LR: (0.001, 0.002, 0.004)}
ARM = Arm("sinkgd", {"optimizer.recipe": "sinkgd"}, GRID, widened=True)


def plan_for(*arms, **options):
    return plan_of(find_study("iterations"), "machine", arms=arms, **options)


def bowl(lr, matrix_lr):
    """Return losses that are lowest at these rates and rise by 1 for each factor of 2."""

    def loss(point):
        return 1 + abs(math.log2(point[LR] / lr)) + abs(math.log2(point[MATRIX_LR] / matrix_lr))

    return loss


def run_on(scheduler, loss, runs=10_000):
    """Run at most so many tasks with made-up losses; return their names."""
    names = []
    while len(names) < runs and (task := scheduler.next_task()) is not None:
        names.append(task.name)
        value = loss(task.point) if task.tuning else 1.0
        run = made_up_run(task.name, task.seed, value)
        scheduler.finish(RunResult(task.arm.name, task.tuning, task.point, run))
    return names


def run_all(plan, loss):
    record = StudyRecord(plan.as_json(), "sinkgd experiment made-up")
    scheduler = Scheduler(plan, record)
    names = run_on(scheduler, loss)
    assert scheduler.left == 0
    assert len(names) == len(set(names)) == scheduler.runs
    return record, names


@given(
    st.integers(-5, 5).map(lambda k: 0.08 * 2.0**k),
    st.integers(-5, 5).map(lambda k: 0.002 * 2.0**k),
)
def test_the_search_reaches_the_lowest_point_and_tries_all_around_it(lr, matrix_lr):
    record, _ = run_all(plan_for(ARM), bowl(lr, matrix_lr))
    (one,) = StudyResults.of(record).arms
    assert one.chosen == pytest.approx({LR: lr, MATRIX_LR: matrix_lr}, rel=1e-4)
    assert one.edges == []
    tried = [result.point for result in one.grid]
    assert all(point in tried for point in ARM.neighbors(one.chosen))
    assert {tuple(r.point.items()) for r in one.seeds} == {tuple(one.chosen.items())}


def test_a_best_point_in_the_middle_costs_only_the_neighbors_of_the_other_field():
    record, names = run_all(plan_for(ARM), bowl(0.08, 0.002))
    assert [name.partition("-tune-")[2] for name in names[:5]] == [
        *("lr0.08-matrix_lr0.001", "lr0.08-matrix_lr0.002", "lr0.08-matrix_lr0.004"),
        *("lr0.04-matrix_lr0.002", "lr0.16-matrix_lr0.002"),
    ]
    assert len(record.runs) == 5 + 3


def test_a_grid_without_widening_ends_at_its_edge():
    record, names = run_all(plan_for(replace(ARM, widened=False)), bowl(0.08, 0.032))
    assert len(names) == 3 + 3
    assert StudyResults.of(record).arms[0].edges == ["optimizer.matrix_lr = 0.004"]


def test_points_that_diverge_are_not_walked_into():
    fall = bowl(0.08, 1.0)  # lower and lower, until training diverges
    record, _ = run_all(
        plan_for(ARM), lambda point: fall(point) if point[MATRIX_LR] < 0.02 else math.inf
    )
    (one,) = StudyResults.of(record).arms
    assert one.chosen == {LR: 0.08, MATRIX_LR: 0.016}
    assert one.edges == []


def test_an_arm_that_diverges_everywhere_is_not_searched_any_further():
    plan = plan_for(ARM)
    scheduler = Scheduler(plan, StudyRecord(plan.as_json(), "sinkgd experiment made-up"))
    assert len(run_on(scheduler, lambda _: math.inf)) == 3
    assert scheduler.left == 0


@pytest.mark.parametrize("stop", range(1, 14))
def test_a_search_that_was_stopped_goes_on_with_the_same_points(stop):
    plan, loss = plan_for(ARM, replace(ARM, name="other")), bowl(0.02, 0.016)
    record = StudyRecord(plan.as_json(), "sinkgd experiment made-up")
    before = run_on(Scheduler(plan, record), loss, stop)
    after = run_on(Scheduler(plan, record), loss)
    _, whole = run_all(plan, loss)
    assert before + after == whole


def test_ratios_that_floats_do_not_hold_name_every_point_once():
    arm = replace(ARM, tuned={LR: (0.0003, 0.001, 0.003)})
    point, seen = {LR: 0.001}, {0.001}
    for side in (0, 1):
        for _ in range(6):
            around = arm.neighbors(point)
            back = arm.neighbors(around[side])
            assert back[1 - side] == point
            point = around[side]
            seen.add(point[LR])
    assert len(seen) == 7


def test_the_record_keeps_whether_a_grid_was_widened():
    for arm in (ARM, replace(ARM, widened=False)):
        assert arm_from_json(arm.name, json.loads(json.dumps(arm_as_json(arm)))) == arm


def test_all_arms_of_a_study_are_widened_or_none():
    check_arms("made-up", (ARM, replace(ARM, name="other")))
    with pytest.raises(ConfigError, match="the grids of other are not widened"):
        check_arms("made-up", (ARM, replace(ARM, name="other", widened=False)))


@pytest.mark.parametrize("values", [(0.1, 0.1), (0.1, 0.2, 0.2), (0.1, 0.1000001), (0.0, 0.1)])
def test_grids_that_cannot_go_on_are_refused(values):
    with pytest.raises(ConfigError, match=r"arm 'sinkgd' .* cannot be widened; give values above"):
        check_arms("made-up", (replace(ARM, tuned={LR: values}),))


def test_page_and_search_choose_the_same_of_equal_points():
    plan = plan_for(ARM)
    record, _ = run_all(plan, lambda point: 1.0 if point[MATRIX_LR] > 0.0015 else 2.0)
    results = list(record.runs.items())
    backwards = StudyRecord(plan.as_json(), "sinkgd experiment", dict(reversed(results)))
    chosen = [StudyResults.of(one).arms[0].chosen for one in (record, backwards)]
    used = {tuple(r.point.items()) for r in record.runs.values() if not r.tuning}
    assert chosen[0] == chosen[1]
    assert used == {tuple(chosen[0].items())}


def test_an_unfinished_search_is_at_no_edge():
    plan = plan_for(ARM)
    record = StudyRecord(plan.as_json(), "sinkgd experiment made-up")
    run_on(Scheduler(plan, record), bowl(0.08, 0.032), 4)
    assert StudyResults.of(record).arms[0].edges == []


def table1_arm(*rates):
    study = STUDIES["table1"]
    shared = study.settings["machine"].shared
    (arm, *_) = select_arms(study, "machine", shared, axis={}, rates=rates, recipes=["sinkgd"])
    return arm


def test_rates_of_the_user_are_the_only_ones_that_are_tried():
    arm = table1_arm(0.04, 0.08)
    assert not arm.widened
    assert arm.tuned[LR] == (0.04, 0.08)


def test_beside_one_rate_of_the_user_the_other_is_still_widened():
    arm = table1_arm(0.05)
    assert arm.widened
    assert list(arm.tuned) == [MATRIX_LR]
    record, _ = run_all(plan_for(arm), lambda point: abs(math.log2(point[MATRIX_LR] / 0.032)))
    (one,) = StudyResults.of(record).arms
    assert one.chosen == {MATRIX_LR: pytest.approx(0.032)}
    assert arm.overrides[LR] == 0.05


def test_one_rate_for_arms_with_and_without_another_names_the_sizes_of_the_grids():
    study = STUDIES["table1"]
    shared = study.settings["machine"].shared
    arms = select_arms(study, "machine", shared, axis={}, rates=(0.08,))
    with pytest.raises(ConfigError, match=r"numbers of points .* sinkgd 3.* adamw-one-lr 1"):
        check_arms("table1", arms)
