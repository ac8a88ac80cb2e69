"""One arm of a study with its own options: `sinkgd experiment lens --step S2 …`."""

import pytest

from sinkgd.lab.cli import main
from sinkgd.lab.experiments.selection import STEP_OPTIONS, select_step
from sinkgd.lab.experiments.studies import find_study
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.train.config import ConfigError

LENS = find_study("lens").settings["machine"].arms


def test_a_step_runs_beside_its_control_with_the_values_that_are_given():
    *controls, step = sorted(
        select_step(LENS, "S2", {"tau": 0.12, "iterations": 7, "lr": 5e-4}),
        key=lambda arm: arm.name == "S2",
    )
    assert controls == [arm for arm in LENS if arm.control]
    own = next(arm for arm in LENS if arm.name == "S2")
    changed = {"optimizer.tau": 0.12, "optimizer.n_iter": 7, "optimizer.lr": 5e-4}
    assert step.overrides == {**own.overrides, **changed}
    assert not step.tuned  # the rate was all that it tunes


def test_a_rate_that_is_not_given_is_tuned():
    (step,) = [arm for arm in select_step(LENS, "S3", {"tau": 0.3}) if not arm.control]
    assert step.tuned == next(arm for arm in LENS if arm.name == "S3").tuned


def test_iterations_are_those_of_the_arms_recipe():
    arms = find_study("table1").settings["machine"].arms
    own = next(arm for arm in arms if arm.recipe.startswith("sinkgd"))
    step = next(arm for arm in select_step(arms, own.name, {"iterations": 3}) if not arm.control)
    assert step.overrides["optimizer.sinkhorn_iterations"] == 3


@pytest.mark.parametrize("name", STEP_OPTIONS)
def test_an_option_that_changes_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=rf"--optimizer\.{name} changes one arm.*--step"):
        select_step(LENS, None, {name: 1})
    if name != "lr":
        with pytest.raises(ConfigError, match=rf"optimizer\.{name} is 1, but arm 'S0'"):
            select_step(LENS, "S0", {name: 1})
    with pytest.raises(ConfigError, match=r"step is .S4.; .*S3"):
        select_step(LENS, "S4", {})


def test_a_dry_run_shows_the_step(capsys):
    words = ["--step", "S2", "--optimizer.tau", ".12", "--optimizer.iterations", "7"]
    assert main(["experiment", "lens", *words, "--optimizer.lr", "5e-4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "S0" in shown
    assert "S2" in shown
    assert "S1" not in shown
    assert main(["experiment", "lens", "--optimizer.tau", ".12", "--dry-run"]) == 2
    assert "--step" in capsys.readouterr().err


def runs_by_arm(shown):
    rows = [line.split() for line in shown.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 5 and row[1].isdigit()}


def test_seeds_that_are_asked_for_hold_for_all_arms(capsys):
    """By itself `ladder` has three seeds at the small sizes, and two at the large ones."""
    for words, runs in (([], [6, 5]), (["--seeds", "4"], [7, 7])):
        assert main(["experiment", "ladder", "--optimizer", "adamw", *words, "--dry-run"]) == 0
        shown = runs_by_arm(capsys.readouterr().out)
        assert [shown[name] for name in ("adamw-nano-32", "adamw-nano-96")] == runs


def test_an_arm_may_be_chosen_by_its_own_name(capsys):
    for given, arms in (("lion-two-lrs", ["lion-two-lrs"]), ("lion", ["lion", "lion-two-lrs"])):
        assert main(["experiment", "table1", "--optimizer", given, "--dry-run"]) == 0
        assert list(runs_by_arm(capsys.readouterr().out)) == arms


def test_arms_of_table1_differ_without_tuning_too():
    """Without a rate of their own for matrices, two arms of a recipe would be equal."""
    plan = plan_of(find_study("table1"), "machine", tune=False)
    configs = [plan.config(plan.seed_task(arm, {}, 0)) for arm in plan.arms]
    assert all(one != other for i, one in enumerate(configs) for other in configs[:i])
