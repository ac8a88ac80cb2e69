"""Arms that take their rates from a smaller model: the order of their runs, and their record."""

import json
import math
from dataclasses import replace

import pytest

from lab.experiments.synthetic_study import made_up_run
from sinkgd.lab.experiments.arms import Arm, Carried, arm_as_json, arm_from_json, check_arms
from sinkgd.lab.experiments.scheduler import Scheduler
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.experiments.study_record import RunResult, StudyRecord
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.train import ConfigError

LR, MATRIX_LR = "optimizer.lr", "optimizer.matrix_lr"
RATES = (0.001, 0.002, 0.004)

SMALL = Arm("small", {"optimizer.recipe": "sinkgd"}, {LR: (0.08,), MATRIX_LR: RATES}, value=1.0)
MIDDLE = Arm(
    "middle",
    {"optimizer.recipe": "sinkgd"},
    value=2.0,
    carried=Carried("small", {MATRIX_LR: 0.5}),
    seeds=1,
)
LARGE = Arm(
    "large",
    {"optimizer.recipe": "sinkgd"},
    value=3.0,
    carried=Carried("small", {MATRIX_LR: 0.25}, (0.5, 1.0, 2.0)),
    seeds=2,
)


def plan_for(*arms, **options):
    return plan_of(find_study("iterations"), "machine", arms=arms, **options)


def run_all(plan, losses):
    """Run a study with made-up losses by name of the run; return its record and the order."""
    record, order = StudyRecord(plan.as_json(), "sinkgd experiment made-up"), []
    scheduler = Scheduler(plan, record)
    while (task := scheduler.next_task()) is not None:
        order.append(task)
        run = made_up_run(task.name, task.seed, losses(task))
        scheduler.finish(RunResult(task.arm.name, task.tuning, task.point, run))
    return record, order, scheduler


def test_carried_arms_start_from_the_best_point_and_run_after_the_seeds_of_small_ones():
    plan = plan_for(SMALL, MIDDLE, LARGE)
    best = {0.002: 4.0, 0.00025: 3.5}  # of the small arm, and of the large one
    record, order, scheduler = run_all(
        plan, lambda task: best.get(task.point[MATRIX_LR], 4.2) if task.tuning else 4.0
    )
    assert scheduler.left == 0
    assert len(order) == plan.runs == 3 + 3 + 1 + 3 + 2
    assert [(task.arm.name, task.tuning) for task in order] == [
        *[("small", True)] * 3,
        ("small", False),
        ("middle", False),
        *[("small", False)] * 2,
        *[("large", True)] * 3,
        *[("large", False)] * 2,
    ]
    points = {(task.arm.name, task.tuning): task.point for task in order}
    assert points["small", False] == {LR: 0.08, MATRIX_LR: 0.002}
    assert points["middle", False] == {LR: 0.08, MATRIX_LR: 0.001}
    assert points["large", False] == {LR: 0.08, MATRIX_LR: 0.00025}
    assert {t.point[MATRIX_LR] for t in order if t.arm.name == "large" and t.tuning} == {
        0.00025,
        0.0005,
        0.001,
    }
    large = StudyResults.of(record).arm("large")
    assert large.chosen == {LR: 0.08, MATRIX_LR: 0.00025}
    assert large.edges == ["optimizer.matrix_lr = 0.00025"]
    assert StudyResults.of(record).arm("middle").edges == []


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_carried_arms_wait_until_the_grid_of_their_source_has_grown_enough(at_once):
    plan = plan_for(replace(SMALL, widened=True), MIDDLE, LARGE)
    record, order, running = StudyRecord(plan.as_json(), "sinkgd experiment made-up"), [], []
    scheduler = Scheduler(plan, record)

    def loss(point):  # lowest at 0.16 and 0.016, both outside the grid
        return 4 + abs(math.log2(point[LR] / 0.16)) + abs(math.log2(point[MATRIX_LR] / 0.016))

    while True:
        while len(running) < at_once and (task := scheduler.next_task()) is not None:
            running.append(task)
        if not running:
            break
        task = running.pop(0)
        order.append(task)
        run = made_up_run(task.name, task.seed, loss(task.point))
        scheduler.finish(RunResult(task.arm.name, task.tuning, task.point, run))
    assert scheduler.left == 0
    first = next(place for place, task in enumerate(order) if task.arm.name != "small")
    assert not any(task.arm.name == "small" and task.tuning for task in order[first:])
    best = {"small": 0.016, "middle": 0.008, "large": 0.008}  # the largest of 0.002, 0.004, 0.008
    for name, rate in best.items():
        assert StudyResults.of(record).arm(name).seeds[0].point == {LR: 0.16, MATRIX_LR: rate}


def test_a_study_is_continued_from_its_record():
    plan = plan_for(SMALL, MIDDLE, LARGE)
    record, order, _ = run_all(plan, lambda task: 4.0)
    for cut in range(len(order)):
        runs = dict(list(record.runs.items())[:cut])
        scheduler = Scheduler(plan, StudyRecord(plan.as_json(), "", runs=runs))
        assert scheduler.left == len(order) - cut
        assert scheduler.next_task() == order[cut]


def test_arms_whose_source_diverged_everywhere_are_left_out():
    plan = plan_for(SMALL, MIDDLE, LARGE)
    record, order, scheduler = run_all(plan, lambda task: math.inf)
    assert [task.arm.name for task in order] == ["small"] * 3
    assert scheduler.left == 0
    assert len(record.runs) == 3


def test_without_tuning_every_arm_has_the_rates_of_its_recipe():
    plan = plan_for(SMALL, MIDDLE, LARGE, tune=False)
    _, order, _ = run_all(plan, lambda task: 4.0)
    assert len(order) == plan.runs == 3 + 1 + 2
    assert all(task.point == {} for task in order)


def test_a_carried_arm_needs_its_source_and_arms_of_one_size_need_equal_grids():
    with pytest.raises(ConfigError, match=r"'large' .* from 'small', which is not among the arms"):
        check_arms("odd", (LARGE,))
    with pytest.raises(ConfigError, match=r"'chain' .* from 'middle', which is not among"):
        check_arms("odd", (SMALL, MIDDLE, replace(MIDDLE, name="chain", carried=Carried("middle"))))
    other = replace(LARGE, name="other", carried=Carried("small", {}, (1.0, 2.0)))
    with pytest.raises(ConfigError, match="grids are large 3, other 2; give each the same"):
        check_arms("odd", (SMALL, LARGE, other))
    check_arms("fine", (SMALL, MIDDLE, LARGE))


@pytest.mark.parametrize("arm", [SMALL, MIDDLE, LARGE], ids=lambda arm: arm.name)
def test_the_record_has_everything_about_an_arm(arm):
    assert arm_from_json(arm.name, json.loads(json.dumps(arm_as_json(arm)))) == arm
