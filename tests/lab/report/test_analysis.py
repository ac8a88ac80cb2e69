"""The numbers of a comparison, checked by hand on runs of a few steps.

A step is 100 tokens and, unless given otherwise, one second.
"""

import math
from dataclasses import replace

import pytest

from lab.report.synthetic_runs import evaluation, write_run
from sinkgd.lab.report import (
    Reach,
    ReportError,
    Spread,
    analyze,
    default_baseline,
    first_reach,
    read_runs,
)
from sinkgd.lab.report.analysis import preset_of


def test_reach_is_linear_between_two_evaluations():
    losses = [evaluation(10, 6.0), evaluation(20, 5.0), evaluation(30, 3.0)]
    assert first_reach(losses, 4.5) == Reach(step=22.5, tokens=2250, seconds=22.5)


def test_reach_is_the_first_of_several():
    losses = [evaluation(10, 6.0), evaluation(20, 4.0), evaluation(30, 5.0), evaluation(40, 4.0)]
    assert first_reach(losses, 5.0) == Reach(step=15, tokens=1500, seconds=15)


def test_reach_of_exactly_the_target_counts():
    assert first_reach([evaluation(10, 5.0), evaluation(20, 4.0)], 4.0) == Reach(20, 2000, 20)


def test_reach_before_the_first_evaluation_is_bounded_by_it():
    assert first_reach([evaluation(10, 3.0)], 4.0) == Reach(10, 1000, 10)


def test_reach_never_is_none():
    assert first_reach([evaluation(10, 5.0), evaluation(20, 4.1)], 4.0) is None
    assert first_reach([], 4.0) is None


def test_reach_passes_over_losses_that_are_no_number():
    losses = [evaluation(10, math.nan), evaluation(20, 3.0)]
    assert first_reach(losses, 4.0) == Reach(20, 2000, 20)
    assert first_reach([evaluation(10, math.nan)], 4.0) is None


def test_a_faster_recipe_against_the_baseline(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}, step_seconds=2.0),
        # Falls from 5 at step 5 to 3 at step 15: it is at 4 after 10 steps.
        write_run(tmp_path, "sinkgd", {5: 5.0, 15: 3.0}, step_seconds=2.5),
    ]
    analysis = analyze(runs, "adamw")
    sinkgd = analysis.comparisons["sinkgd"]
    assert analysis.target == 4.0
    assert (sinkgd.steps.mean, sinkgd.tokens.mean, sinkgd.seconds.mean) == (10, 1000, 25)
    assert sinkgd.token_fraction.mean == 0.5  # of 2000 tokens
    assert sinkgd.time_fraction.mean == 0.625  # of 40 seconds
    assert sinkgd.effective_tokens_per_second.mean == 80  # 2000 tokens in 25 seconds
    assert sinkgd.effective_speedup == 1.6  # over 50 tokens a second
    assert analysis.recipes[1].tokens_per_second.mean == 40


def test_the_baseline_needed_all_its_tokens(tmp_path):
    runs = [write_run(tmp_path, "adamw", {10: 4.0, 20: 4.0}), write_run(tmp_path, "sgd", {20: 9.0})]
    adamw = analyze(runs, "adamw").comparisons["adamw"]
    assert adamw.tokens.mean == 2000
    assert adamw.token_fraction.mean == adamw.time_fraction.mean == adamw.effective_speedup == 1
    assert adamw.effective_tokens_per_second.mean == 100


def test_a_recipe_that_never_got_there_has_no_figures(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: 4.0}), write_run(tmp_path, "sgd", {20: 4.5})]
    sgd = analyze(runs, "adamw").comparisons["sgd"]
    assert (sgd.reached_runs, sgd.runs) == (0, 1)
    assert sgd.tokens is sgd.seconds is sgd.effective_tokens_per_second is None
    assert sgd.effective_speedup is None


def test_seeds_are_averaged_with_their_range(tmp_path):
    adamw = [
        write_run(tmp_path, "adamw", {10: 5.0, 20: loss}, seed=seed)
        for seed, loss in enumerate([3.9, 4.0, 4.1])
    ]
    # Through 4.0 at 1000, 1500 and 2000.
    sinkgd = [
        write_run(tmp_path, "sinkgd", losses, seed=seed)
        for seed, losses in enumerate([{10: 4.0, 20: 3.5}, {10: 5.0, 20: 3.0}, {20: 4.0}])
    ]
    analysis = analyze([*sinkgd, *adamw], "adamw")
    assert [recipe.name for recipe in analysis.recipes] == ["adamw", "sinkgd"]
    assert analysis.recipes[0].seeds == 3
    assert analysis.target == pytest.approx(4.0)
    loss = analysis.recipes[0].val_loss
    assert (loss.low, loss.high, loss.count) == (3.9, 4.1, 3)
    comparison = analysis.comparisons["sinkgd"]
    assert (comparison.reached_runs, comparison.runs) == (3, 3)
    assert comparison.tokens.mean == pytest.approx(1500)
    assert (comparison.tokens.low, comparison.tokens.high) == pytest.approx((1000, 2000))


@pytest.mark.parametrize("third", [{"losses": {20: 4.5}}, {"losses": {}, "status": "failed"}])
def test_a_cost_is_given_only_if_all_runs_reached_the_loss(tmp_path, third):
    runs = [write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0})]
    for seed, one in enumerate([{"losses": {20: 3.9}}, {"losses": {20: 3.9}}, third]):
        losses = one["losses"]
        runs.append(
            write_run(tmp_path, "sinkgd", losses, seed=seed, status=one.get("status", "finished"))
        )
    comparison = analyze(runs, "adamw").comparisons["sinkgd"]
    assert (comparison.reached_runs, comparison.runs) == (2, 3)
    assert comparison.tokens is comparison.token_fraction is comparison.time_fraction is None
    assert comparison.effective_tokens_per_second is comparison.effective_speedup is None
    assert comparison.shortfall == "reached in 2 of 3 runs"


@pytest.mark.parametrize(
    ("losses", "level"),
    [
        ([3.95, 4.05, 4.0], True),
        ([4.0, 4.2, 4.1001], False),  # ranges overlap, but each seed is higher by 0.1
        ([3.5, 3.6, 4.5], True),  # lower in two seeds, higher in one
        ([3.5, 3.6, 3.55], False),
        ([3.8, 4.1], True),  # two seeds know little
        ([3.8], False),  # and one nothing
        ([4.0002], True),  # alike to the digits that are printed
    ],
)
def test_recipes_are_level_if_the_interval_over_paired_seeds_contains_zero(tmp_path, losses, level):
    base = [3.9, 4.1, 4.0]
    runs = [write_run(tmp_path, "adamw", {20: x}, seed=i) for i, x in enumerate(base)]
    runs += [write_run(tmp_path, "sinkgd", {20: x}, seed=i) for i, x in enumerate(losses)]
    assert analyze(runs, "adamw").comparisons["sinkgd"].level is level


def test_unfinished_runs_are_kept_and_in_no_average(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {20: 4.0}),
        write_run(tmp_path, "adamw", {10: 9.0}, seed=1, status="failed", message="NaN"),
        write_run(tmp_path, "sinkgd", {10: 3.0}, status=None),
    ]
    analysis = analyze(runs, "adamw")
    assert analysis.target == 4.0
    assert [len(recipe.runs) for recipe in analysis.recipes] == [2, 1]
    assert [len(recipe.finished) for recipe in analysis.recipes] == [1, 0]
    assert analysis.recipes[1].val_loss is None
    assert analysis.comparisons["sinkgd"].reached_runs == 0


def test_a_baseline_without_a_finished_run_sets_no_target(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {20: 4.0}, status="interrupted"),
        write_run(tmp_path, "sinkgd", {20: 3.0}),
    ]
    analysis = analyze(runs, "adamw")
    assert analysis.target is None
    assert analysis.comparisons == {}


def test_a_baseline_that_diverged_sets_no_target(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {20: math.nan}),
        write_run(tmp_path, "sinkgd", {20: 3.0}),
    ]
    assert analyze(runs, "adamw").target is None


def test_the_optimizers_share_is_of_the_time_in_steps(tmp_path):
    run = write_run(tmp_path, "adamw", {20: 4.0}, step_seconds=2.0, optimizer_seconds=0.5)
    [recipe] = analyze([run], None).recipes
    assert recipe.optimizer_share == Spread(0.25, 0.25, 0.25, 1)
    assert recipe.step_seconds.mean == 2.0


def test_an_unknown_baseline_is_named_beside_the_nearest(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: 4.0}), write_run(tmp_path, "sinkgd", {20: 4.0})]
    with pytest.raises(ReportError, match=r"'adam' has no run.*adamw, sinkgd.*mean 'adamw'"):
        analyze(runs, "adam")


def test_no_runs_are_refused():
    with pytest.raises(ReportError, match="there are no runs"):
        analyze([], None)


@pytest.mark.parametrize(
    ("recipes", "chosen"),
    [
        (["sinkgd", "adamw-one-lr", "adamw"], "adamw"),
        (["sinkgd", "adamw-one-lr"], "adamw-one-lr"),
        (["sinkgd"], None),
    ],
)
def test_the_default_baseline_is_the_fair_adamw(tmp_path, recipes, chosen):
    runs = [write_run(tmp_path, recipe, {5: 4.0}) for recipe in recipes]
    assert default_baseline(runs) == chosen


def test_a_folder_is_read_with_the_runs_one_level_below(tmp_path):
    for recipe in ("adamw", "sinkgd"):
        write_run(tmp_path, recipe, {5: 4.0})
    assert sorted(run.start.recipe for run in read_runs(tmp_path)) == ["adamw", "sinkgd"]


def test_a_runs_own_folder_is_read_too(tmp_path):
    run = write_run(tmp_path, "adamw", {5: 4.0})
    assert read_runs(run.path.parent) == [run]


def test_an_empty_folder_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ReportError, match=r"holds no runs.*`sinkgd compare --out"):
        read_runs(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        read_runs(tmp_path / "absent")


def test_runs_can_be_grouped_by_something_else_than_their_recipe(tmp_path):
    runs = [write_run(tmp_path, "sinkgd", {10: loss}, name=name) for name, loss in
            (("a-0", 4.0), ("a-1", 4.2), ("b-0", 5.0))]  # fmt: skip
    analysis = analyze(runs, "b", group=lambda run: run.start.name[0])
    assert [(one.name, len(one.runs)) for one in analysis.recipes] == [("b", 1), ("a", 2)]
    assert analysis.comparisons["a"].reached_runs == 2


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_steps_that_took_no_time_have_no_speed(tmp_path, seconds):
    run = write_run(tmp_path, "adamw", {10: 5.0})
    run.steps = [replace(step, step_seconds=seconds) for step in run.steps]
    (recipe,) = analyze([run], None).recipes
    assert recipe.tokens_per_second is None
    assert recipe.optimizer_share is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"preset": "llama-60m", "weights": "runs/llama-1b"}, "llama-60m"),
        ({"weights": "checkpoints/llama-1b"}, "the model in llama-1b"),
        ({}, "an unnamed model"),
    ],
)
def test_a_model_is_named_by_its_preset_or_by_the_folder_of_its_weights(tmp_path, model, name):
    run = write_run(tmp_path / "run", "adamw", {1: 4.0})
    assert preset_of(replace(run, start=replace(run.start, config={"model": model}))) == name
