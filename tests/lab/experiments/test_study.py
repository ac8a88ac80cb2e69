"""Studies as data: arms are told apart, tuned alike, and every option is checked at once."""

from dataclasses import replace

import pytest

from sinkgd.lab.experiments.arms import Arm, check_arms, override
from sinkgd.lab.experiments.selection import numbers, select_arms
from sinkgd.lab.experiments.studies import STUDIES, find_study
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.experiments.study_verdict import compared
from sinkgd.lab.models.presets import preset_config
from sinkgd.lab.report.difference import Difference
from sinkgd.lab.train import RECIPES, ConfigError, RunConfig

LR = "optimizer.lr"


def selected(study, shared=None, **options):
    shared = study.settings["machine"].shared if shared is None else shared
    return select_arms(study, "machine", shared, **options)


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
@pytest.mark.parametrize("scale", ["machine", "paper"])
def test_every_arm_of_every_study_is_a_configuration(study, scale):
    plan = plan_of(study, scale)
    missing = {str(arm.overrides["optimizer.recipe"]) for arm in plan.arms} - set(RECIPES)
    if missing:
        pytest.skip(f"no such recipes: {', '.join(sorted(missing))}")
    plan.check()
    assert study.question.endswith("?")
    assert len(plan.seeds) >= 3


def linear_work(preset, tokens):
    return preset_config(preset, vocab_size=2048).linear_parameter_count * tokens


def test_a_machine_study_fits_forty_minutes_at_fifty_core_seconds_for_half_a_million_tokens():
    per_core_second = linear_work("llama-nano", 240 * 2048) / 50
    for study in STUDIES.values():
        # A fit needs models of several sizes, additions to the default need long runs, ranks are
        # compared at two widths, and the benchmark has 21 arms.
        if study.name in ("ladder", "rank", "recipes", "table1"):
            continue
        plan, work = plan_of(study, "machine"), 0
        for arm, task in zip(plan.arms, plan.first_tasks(), strict=True):
            config = plan.config(task)
            tokens = config.training.steps * config.tokens_per_step
            runs = plan.runs_of(arm)
            work += runs * linear_work(config.model.preset, tokens)
        assert work / per_core_second / 2 <= 40 * 60, study.name


def test_both_adamws_are_among_the_controls():
    for study in STUDIES.values():
        expected = {"adamw", "adamw-one-lr"}
        if study.name == "finetune":  # those who fine-tune give AdamW one rate for all weights
            expected = {"adamw-one-lr"}
        if study.name in ("beta1", "ladder", "recipes"):  # these ask about the fair one
            expected = {"adamw"}
        if study.name == "rank":  # this compares ranks with each other
            expected = set()
        for setting in study.settings.values():
            recipes = {arm.overrides["optimizer.recipe"] for arm in setting.arms if arm.control}
            assert recipes >= expected, study.name


def test_arms_with_grids_of_unequal_size_are_refused():
    arms = (Arm("a", {}, {LR: (1.0, 2.0)}), Arm("b", {}, {LR: (1.0,)}))
    with pytest.raises(ConfigError, match=r"not tuned alike: .* a 2, b 1; give each the same"):
        check_arms("odd", arms)
    with pytest.raises(ConfigError, match="more than one arm called a"):
        check_arms("odd", (arms[0], arms[0]))


def test_an_override_of_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'optimizer.lrr'.*did you mean 'optimizer.lr'"):
        override(RunConfig(), {"optimizer.lrr": 1})


def test_seeds_pair_up_across_arms_and_are_not_that_of_tuning():
    plan = plan_of(find_study("iterations"), "machine")
    a, b = (plan.config(plan.seed_task(arm, {}, 1)) for arm in plan.arms[:2])
    assert a.training == b.training
    assert a.data == b.data
    with pytest.raises(ConfigError, match="seed 1000 is used for tuning"):
        plan_of(find_study("iterations"), "machine", seeds=(999, 1000)).check()


def test_the_axis_rates_and_recipes_can_be_chosen():
    study = find_study("iterations")
    arms = selected(study, axis={"iterations": (2, 7)})
    assert [arm.name for arm in arms] == ["L2", "L7", "adamw", "adamw-one-lr"]
    arms = selected(study, axis={}, rates=(0.5,), recipes=["sinkgd-paper", "adamw"])
    assert {arm.overrides[LR] for arm in arms} == {0.5}
    assert {len(arm.points()) for arm in arms} == {6}
    alpha = selected(find_study("alpha"), axis={}, rates=(0.04,))[0]
    assert alpha.overrides["optimizer.matrix_lr"] == pytest.approx(0.01 * 0.04)


def test_a_larger_batch_takes_fewer_steps_of_the_tokens_that_options_give():
    study = find_study("batch")
    shared = study.settings["machine"].shared
    shared = replace(shared, training=replace(shared.training, steps=100, batch_size=8))
    arms = selected(study, shared, axis={"batch": (4, 16)})
    sizes = {(a.overrides["training.batch_size"], a.overrides["training.steps"]) for a in arms}
    assert sizes == {(4, 200), (16, 50)}


def test_an_option_that_would_do_nothing_is_refused():
    study = find_study("ablation")
    setting = study.settings["machine"]
    arm = Arm("long", {"training.steps": 9})
    odd = replace(study, settings={"machine": replace(setting, arms=(arm,))})
    shared = replace(setting.shared, training=replace(setting.shared.training, steps=7))
    with pytest.raises(ConfigError, match=r"training\.steps is 7, but the study sets it for long"):
        selected(odd, shared, axis={})


@pytest.mark.parametrize(("scale", "preset"), [("machine", None), ("paper", "llama-1b")])
def test_an_option_that_the_arms_of_an_axis_set_is_refused(scale, preset):
    study = find_study("batch")
    shared = study.settings[scale].of_model(preset)
    select_arms(study, scale, shared, axis={})  # the settings of the model itself are no options
    rarely = replace(shared, evaluation=replace(shared.evaluation, every_steps=5))
    with pytest.raises(ConfigError, match=r"evaluation\.every_steps is 5, but the study sets it"):
        select_arms(study, scale, rarely, axis={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": {"alpha": (0.1,)}}, "study 'iterations' does not take --alpha; its axis is"),
        ({"axis": {}, "recipes": ["sinkdg-paper"]}, "did you mean 'sinkgd-paper'"),
        ({"axis": {}, "recipes": ["deflated"]}, "'deflated'; it is called 'sinkgd' now"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        selected(find_study("iterations"), **options)


def test_no_axis_is_offered_that_is_not_an_option():
    with pytest.raises(ConfigError, match="does not take --alpha; its positions are fixed"):
        selected(find_study("width"), axis={"alpha": (0.1,)})


def test_numbers_must_be_numbers():
    for text in ("a", "1,b", "0", "-1", ""):
        with pytest.raises(ConfigError, match="iterations is "):
            numbers("iterations", text)


def test_an_unknown_study_has_a_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'iterations'"):
        find_study("iteration")


def test_a_difference_is_students_interval_over_pairs():
    # Worked by hand: d = 0.1, 0.2, 0.3; mean 0.2, standard deviation 0.1, t(2) = 4.303.
    first, second = {0: 1.1, 1: 2.2, 2: 3.3}, {0: 1.0, 1: 2.0, 2: 3.0}
    difference = Difference.of(first, second)
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert difference.level
    assert Difference.of({0: 1.0, 5: 9.0}, {0: 1.0, 7: 0.0}).count == 1
    assert Difference.of({0: 2.0, 1: 2.1}, {0: 2.0, 1: 2.1}).level
    inf = float("inf")
    assert Difference.of({0: inf, 1: 2.0}, {0: 1.0, 1: 1.0}).higher
    assert Difference.of({0: 1.0, 1: 1.0}, {0: 1.0, 1: inf}).lower
    both = Difference.of({0: inf, 1: inf}, {0: inf, 1: inf})
    assert both.unknown
    assert both.diverged == (2, 2)


def test_seeds_in_which_both_diverged_do_not_count_as_equal():
    inf = float("inf")
    found = Difference.of({0: inf, 1: 2.0, 2: 2.1}, {0: inf, 1: 2.2, 2: 2.3})
    alone = Difference.of({1: 2.0, 2: 2.1}, {1: 2.2, 2: 2.3})
    assert (found.mean, found.half_width, found.count) == (alone.mean, alone.half_width, 2)


def test_one_seed_is_never_level():
    single = Difference.of({0: 4.0}, {0: 5.0})
    assert single.unknown
    assert not single.level


def test_arms_that_cannot_be_compared_are_said_to_be_so():
    inf = float("inf")
    each = Difference.of({0: inf, 1: 4.0}, {0: 4.0, 1: inf})
    assert not each.lower
    assert not each.higher
    assert compared("a", each, "b") == "a diverged in 1 of 2 seeds, b in 1."
    some = Difference.of({0: inf, 1: inf, 2: 3.0}, {0: inf, 1: 4.0, 2: 4.0})
    assert some.higher
    assert compared("a", some, "b") == "a diverged in 2 of 3 seeds, b in 1."
    nothing = Difference.of({0: 4.0}, {1: 4.0})
    assert compared("a", nothing, "b") == "a and b have no seed in common."
