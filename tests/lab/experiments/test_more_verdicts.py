"""The judges of the studies of options, methods and models, on made-up results."""

import json
import math
from dataclasses import replace

import pytest

from lab.experiments.synthetic_study import made_up, made_up_run
from lab.experiments.test_verdicts import apart, judge, near
from sinkgd.lab.experiments.arms import arm_as_json, arm_from_json
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.studies.lens import roughness
from sinkgd.lab.experiments.studies.pareto import front
from sinkgd.lab.experiments.studies.shift import recovery
from sinkgd.lab.experiments.studies.width import PAPER_WIDTHS, WIDTHS, exponent, good_up_to
from sinkgd.lab.models import preset_config
from sinkgd.lab.report.figures import identify
from sinkgd.lab.results import Evaluation, Memory, Run


def with_runs(results, change):
    """Return results whose reported runs are changed, each with its arm's name."""
    arms = tuple(
        replace(one, seeds=tuple(replace(r, run=change(one.arm.name, r.run)) for r in one.seeds))
        for one in results.arms
    )
    return replace(results, arms=arms)


# Momentum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "headline"),
    [
        (
            near(3.9),
            "Momentum helps: before-0.9 ended at 3.900, and none ended at 4.000.",
        ),
        (near(4.1), "Momentum harms: every kind of momentum ended higher than none."),
        (
            apart(4.0),
            "Momentum does not help measurably: before-0.9 ended at 4.000, and none ended at "
            "4.000.",
        ),
    ],
)
def test_momentum(before, headline):
    losses = {"none": near(4.0), "before-0.9": before, "after-0.9": near(4.2), "adamw": near(4.0)}
    verdict = judge("momentum", losses)
    assert verdict.headline == headline
    assert "after-0.9 ended 0.200 ± 0.000 higher than none." in verdict.sentences


def test_without_plain_sinkgd_momentum_is_compared_with_nothing():
    headline = judge("momentum", {"before-0.9": near(3.9)}).headline
    assert headline == "before-0.9 ended at 3.900; there is nothing to compare it with."


# Tables -------------------------------------------------------------------------------------------


def test_tables_name_the_best_rule_and_who_is_level_with_it():
    losses = {
        "adamw-tables": near(4.0),
        "sinkgd-tables": near(4.3),
        "sage-tables": apart(4.001),
    }
    verdict = judge("tables", losses)
    assert (
        verdict.headline == "adamw-tables ended at 4.000, the lowest; level with it: sage-tables."
    )
    assert "sinkgd-tables ended 0.300 ± 0.000 higher than adamw-tables." in verdict.sentences
    assert any("sage 1" in sentence for sentence in verdict.sentences)


# Spectral -----------------------------------------------------------------------------------------


def test_the_cheapest_that_is_level_with_whitening_is_named():
    losses = {
        "sinkgd-paper": near(4.0),
        "swan-5": near(3.8),
        "swan-2": apart(3.8),
        "pinned": near(3.9),
        "rows-only": near(4.05),
    }
    pace = {"swan-5": 3.0, "swan-2": 2.0}
    verdict = judge("spectral", losses, step_seconds=pace)
    assert verdict.headline == (
        "Whitening lowers the loss by 0.200 ± 0.000. Not measurably worse than swan-5: swan-2; "
        "swan-2 costs the least."
    )
    gains = next(s for s in verdict.sentences if s.startswith("Differences from sinkgd-paper"))
    assert "pinned -0.100 ± 0.000, rows-only +0.050 ± 0.000." in gains
    costs = next(s for s in verdict.sentences if s.startswith("Milliseconds"))
    assert "sinkgd-paper 200.0" in costs  # a fifth of a second
    assert "swan-5 2200.0" in costs
    del losses["swan-2"]
    headline = judge("spectral", losses, step_seconds={"swan-5": 3.0}).headline
    assert headline.endswith("No other arm is known to be level with swan-5.")


def test_one_seed_keeps_no_part_of_whitening():
    losses = {"sinkgd-paper": near(4.0), "swan-5": near(3.8), "pinned": [3.99]}
    assert judge("spectral", losses).headline.endswith(
        "No other arm is known to be level with swan-5."
    )


def test_without_a_gain_there_is_nothing_to_keep():
    verdict = judge("spectral", {"sinkgd-paper": near(4.0), "swan-5": apart(4.0)})
    assert verdict.headline.startswith("There is no gain to keep: swan-5 ended at 4.000")


def test_without_both_ends_the_gain_is_unknown():
    headline = judge("spectral", {"swan-2": near(4.0)}).headline
    assert headline == "swan-2 ended at 4.000; sinkgd-paper and swan-5 do not both have results."


# Width --------------------------------------------------------------------------------------------


def test_widths_are_those_of_the_presets():
    for preset, width in (WIDTHS | PAPER_WIDTHS).items():
        assert preset_config(preset).hidden_size == width


@pytest.mark.parametrize(
    ("pairs", "p"),
    [
        ([(64, 0.004), (128, 0.002), (256, 0.001)], -1.0),
        ([(64, 0.002), (256, 0.002)], 0.0),
        ([(64, 0.001), (128, 0.002)], 1.0),
        ([(64, 0.001)], None),
    ],
)
def test_the_exponent_is_the_slope_of_logarithms(pairs, p):
    assert exponent(pairs) == p


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ([4.04, 4.01, 4.0, 4.03, 5.0], 0.004),
        ([4.0, 4.06, 4.04, 4.06, 5.0], 0.002),
        ([4.0, 4.2, 4.3, math.inf, math.inf], 0.0005),
        ([math.inf] * 5, None),
    ],
)
def test_a_rate_is_good_as_long_as_the_loss_is_near_the_lowest(losses, rate):
    (one,) = made_up(STUDIES["width"], {"raw-64": near(4.0)}).arms
    grid = [
        replace(result, run=made_up_run("a", 1000, loss))
        for result, loss in zip(one.grid, losses, strict=True)
    ]
    assert good_up_to(replace(one, grid=tuple(grid))) == rate


def test_width_names_the_rule_whose_rate_stays():
    losses = {f"{rule}-{width}": near(4.0) for rule in ("raw", "pinned") for width in (64, 256)}
    best = {"raw-64": 3, "raw-256": 1, "pinned-64": 2, "pinned-256": 2}
    verdict = judge("width", losses, best=best)
    assert verdict.headline == (
        "The largest good rate depends least on the width with pinned: lr ∝ d^0.00 (raw: d^-1.00)."
    )
    assert verdict.sentences[0] == (
        "raw is good up to 0.004 at 64, 0.001 at 256: lr ∝ d^-1.00; best at 0.004, 0.001."
    )
    assert "Final losses at 256: raw 4.000, pinned 4.000." in verdict.sentences
    alone = judge("width", {"raw-64": near(4.0)})
    assert alone.headline.startswith("No rule has a fit: the largest good rate is not known at two")
    assert alone.sentences[0].startswith("raw is good up to 0.001 at 64; best at")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (4, "sinkgd is good up to at least 0.008 at 64, 0.002 at 256; best at 0.008, 0.002."),
        (0, "sinkgd is good up to at most 0.0005 at 64, 0.002 at 256; best at 0.0005, 0.002."),
    ],
)
def test_a_rule_whose_best_rate_is_at_an_end_of_its_grid_has_no_fit(place, words):
    losses = {f"{rule}-{width}": near(4.0) for rule in ("raw", "sinkgd") for width in (64, 256)}
    best = {"raw-64": 3, "raw-256": 1, "sinkgd-64": place, "sinkgd-256": 2}  # of five
    verdict = judge("width", losses, best=best)
    assert verdict.headline.startswith(
        "Of the rules with a fit, the largest good rate depends least"
    )
    assert words in verdict.sentences
    only = judge(
        "width", {name: own for name, own in losses.items() if "sinkgd" in name}, best=best
    )
    assert only.headline.startswith("No rule has a fit:")
    assert words in only.sentences


# Shift --------------------------------------------------------------------------------------------


def curve(losses, at=4):
    """A run evaluated after every step, whose vocabulary changes after step ``at``."""

    def change(run: Run) -> Run:
        rows = [
            Evaluation(i, 1000 * i, float(i), loss, 1.0, 1.0, 64)
            for i, loss in enumerate(losses, start=1)
        ]
        start = replace(run.start, config={"data": {"shift_at_step": at}})
        return replace(run, start=start, evaluations=rows)

    return change


BEFORE = [6.0, 5.5, 5.2, 5.0]


@pytest.mark.parametrize(
    ("after", "tokens"),
    [([7.0, 5.5, 4.5], 2500.0), ([7.0, 6.0, 5.5], None), ([7.0, 5.0], 2000.0), ([], None)],
)
def test_a_recovery_is_the_way_back_to_the_loss_before(after, tokens):
    (arm,) = made_up(STUDIES["shift"], {"sinkgd": [4.0]}).arms
    assert recovery(curve(BEFORE + after)(arm.seeds[0].run)) == tokens


def test_shift_ranks_by_recovery_and_says_who_did_not_come_back():
    results = made_up(
        STUDIES["shift"], {"sinkgd": near(4.5), "swan": near(4.5), "adamw": near(6.0)}
    )
    after = {"sinkgd": [7.0, 5.5, 4.5], "swan": [6.0, 4.0, 4.5], "adamw": [7.0, 6.5, 6.0]}
    verdict = STUDIES["shift"].judge(
        with_runs(results, lambda arm, run: curve(BEFORE + after[arm])(run))
    )
    assert verdict.headline == (
        "swan is the first to be back at its loss before the change, after 1.50k tokens."
    )
    assert "adamw did not come back." in verdict.sentences
    assert any("swan 5.000, sinkgd 5.000, adamw 5.000." in said for said in verdict.sentences)
    nobody = with_runs(results, lambda arm, run: curve([*BEFORE, 7.0, 6.5])(run))
    headline = STUDIES["shift"].judge(nobody).headline
    assert headline == "No method is back at its loss before the change in every seed."


# Pareto -------------------------------------------------------------------------------------------


def weighed(sizes):
    def change(arm: str, run: Run) -> Run:
        assert run.end is not None
        return replace(run, end=replace(run.end, memory=Memory(1, 1, sizes[arm], 1)))

    return change


def test_the_front_has_whom_none_beats_in_memory_or_loss():
    losses = {
        "sinkgd-paper": near(4.0),
        "sinkgd-stateless": near(4.4),
        "swan": near(3.9),
        "muon": near(3.8),
        "adamw": apart(3.9),
    }
    sizes = {"sinkgd-paper": 10, "sinkgd-stateless": 0, "swan": 10, "muon": 30, "adamw": 40}
    results = with_runs(made_up(STUDIES["pareto"], losses), weighed(sizes))
    arms = [*results.candidates, *results.controls]
    assert [one.arm.name for one in front(results, arms)] == ["sinkgd-stateless", "swan", "muon"]
    verdict = STUDIES["pareto"].judge(results)
    assert verdict.headline.startswith("On the front of state against loss: sinkgd-stateless (0")
    assert any(one.startswith("adamw is off it") for one in verdict.sentences)
    assert any(one.startswith("The best L × α of sinkgd-paper: L = 1") for one in verdict.sentences)


def test_an_arm_is_beaten_only_by_arms_on_the_front():
    losses = {
        "sinkgd-stateless": near(4.06),
        "sinkgd": apart(4.04),  # level with the one before, which has less state
        "muon": near(4.0),  # level with `sinkgd`, and below `sinkgd-stateless`
    }
    sizes = {"sinkgd-stateless": 0, "sinkgd": 100, "muon": 200}
    results = with_runs(made_up(STUDIES["pareto"], losses), weighed(sizes))
    stateless, sinkgd, muon = (results.arm(name) for name in sizes)
    assert results.difference(muon, sinkgd).level
    assert results.difference(muon, stateless).lower
    found = [one.arm.name for one in front(results, results.candidates)]
    assert found == ["sinkgd-stateless", "muon"]


def test_if_all_diverged_no_front_is_named():
    losses = {"sinkgd": [math.inf] * 3, "muon": [math.inf] * 3}
    verdict = judge("pareto", losses)
    assert verdict.headline == "Every arm diverged in a seed."
    assert not any("is off it" in sentence for sentence in verdict.sentences)


# Table 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "headline"),
    [
        ({"sinkgd": near(4.0)}, "sinkgd ended at 4.000."),
        ({"sinkgd": [math.inf] * 3, "swan": [math.inf, 4.0, 4.0]},
         "Every arm that the question is about diverged in a seed."),
        ({"sinkgd": near(4.0), "swan": near(4.1), "muon": near(3.5), "adamw": near(4.3)},
         "sinkgd ended at 4.000, the lowest beyond the spread of seeds. muon ended lower."),
        ({"sinkgd": [4.0], "swan": [5.0]},
         "sinkgd ended at 4.000, the lowest; swan has too few seeds for a comparison."),
    ],
)  # fmt: skip
def test_the_lowest_is_named_with_what_limits_the_claim(losses, headline):
    assert judge("table1", losses).headline == headline


def test_no_tokens_are_counted_to_the_loss_of_a_control_that_diverged():
    losses = {"sinkgd": near(4.0), "adamw": [math.inf, 4.1, 4.1], "muon": near(4.2)}
    sentences = judge("table1", losses).sentences
    assert sum("so there is no loss of it to reach" in said for said in sentences) == 2
    assert any("needs the fewest tokens for muon’s" in said for said in sentences)


def test_an_arm_that_diverged_in_a_seed_does_not_need_the_fewest_tokens():
    losses = {"sinkgd": [math.inf, 3.0, 3.0], "swan": near(4.0), "adamw": near(4.1)}
    needs = [s for s in judge("table1", losses).sentences if "needs the fewest" in s]
    assert all(said.startswith("Of those without matrix state, swan") for said in needs)
    assert needs


def test_table1_says_who_needs_the_fewest_tokens_for_each_controls_loss():
    losses = {"sinkgd": near(4.0), "swan": near(3.8), "lion": near(3.7), "adamw": near(4.2)}
    verdict = judge("table1", losses)
    assert verdict.headline == "lion ended at 3.700, the lowest beyond the spread of seeds."
    # Of the made-up curve swan's loss is 4.2 above its end by 0.4, between steps 50 and 75.
    needs = [s for s in verdict.sentences if "needs the fewest tokens" in s]
    assert needs[0].startswith("Of those without matrix state, swan needs the fewest tokens for ad")
    assert "62\xa0%" in needs[0]
    assert needs[1].startswith("Of those at O(mn) cost, sinkgd needs the fewest")
    assert "75\xa0%" in needs[1]
    worse = judge("table1", {"sinkgd": near(4.0), "adamw": near(3.5)})
    assert "No method at O(mn) cost reached adamw’s loss in every seed." in worse.sentences


# Recipes ------------------------------------------------------------------------------------------


def test_recipes_name_what_is_lower_than_the_default_and_who_needs_the_fewest_tokens():
    losses = {
        "default": near(4.0),
        "rank-30": apart(4.0),
        "8-bit-momentum": near(3.9),
        "momentum": near(3.7),
        "adamw": near(4.2),
    }
    verdict = judge("recipes", losses)
    assert verdict.headline == (
        "default ended at 4.000. Lower by more than the spread of seeds: momentum ended at 3.700, "
        "8-bit-momentum ended at 3.900."
    )
    assert "8-bit-momentum ended 0.100 ± 0.000 lower than default." in verdict.sentences
    needs = [s for s in verdict.sentences if "needs the fewest tokens" in s]
    none = "Of those without state for each matrix entry, default needs the fewest tokens"
    assert needs[0].startswith(none)
    small = "Of those with at most one byte of state for each matrix entry, 8-bit-momentum needs"
    assert needs[1].startswith(small)
    below = judge("recipes", {**losses, "muon-0.5": near(3.6), "muon": apart(3.7)})
    assert below.headline.endswith(
        ", 8-bit-momentum ended at 3.900. muon-0.5 ended lower than momentum."
    )


def test_recipes_say_that_nothing_is_lower_or_that_the_default_is_missing():
    nothing = judge("recipes", {"default": near(4.0), "rank-30": near(4.1)}).headline
    assert nothing == "default ended at 4.000. Lower by more than the spread of seeds: nothing."
    alone = judge("recipes", {"rank-30": near(4.1)}).headline
    assert alone == "rank-30 ended at 4.100; there is nothing to compare it with."


# Rank ---------------------------------------------------------------------------------------------


def test_ranks_are_compared_at_each_width():
    losses = {
        "width-128-rank-7": near(4.5),
        "width-128-rank-15": apart(4.52),
        "width-256-rank-15": near(4.4),
        "width-256-rank-31": near(4.3),
    }
    verdict = judge("rank", losses)
    assert verdict.headline == (
        "At width 128 rank 7 ends lowest (6.2\xa0% of the width), level with 15. At width 256 rank "
        "31 ends lowest (12\xa0% of the width), beyond the spread of seeds."
    )
    expected = (
        "width-128-rank-15 is level with width-128-rank-7: the difference is",
        "width-256-rank-15 ended 0.100 ± 0.000 higher than width-256-rank-31.",
    )
    for words in expected:
        assert any(sentence.startswith(words) for sentence in verdict.sentences), words
    assert not any("128" in s and "256" in s for s in verdict.sentences)


@pytest.mark.parametrize(("best", "warned"), [(7, True), (15, False), (31, True)])
def test_a_best_rank_that_is_the_smallest_or_largest_is_a_caution(best, warned):
    losses = {f"width-128-rank-{k}": near(4.4 if k == best else 4.5) for k in (7, 15, 31)}
    said = " ".join(judge("rank", losses).cautions)
    assert (
        f"width 128 is that of width-128-rank-{best}, the smallest or largest" in said
    ) == warned


# Beta1 --------------------------------------------------------------------------------------------


def test_the_best_sinkgd_is_compared_with_the_best_adamw_and_muon():
    losses = {
        "adamw-0.5": near(4.5),
        "adamw-0.9": near(4.6),
        "muon-0.8": near(4.7),
        "muon-0.95": near(4.55),
        "sinkgd-0.5": apart(4.51),
        "sinkgd-0.9": near(4.49),
    }
    verdict = judge("beta1", losses)
    assert verdict.headline == (
        "sinkgd-0.9 ended 0.010 ± 0.000 lower than adamw-0.5. "
        "sinkgd-0.9 ended 0.060 ± 0.000 lower than muon-0.95."
    )
    assert "adamw-0.5 ended 0.100 ± 0.000 lower than adamw-0.9." in verdict.sentences
    assert not any("muon-0.8" in sentence for sentence in verdict.sentences)
    alone = judge("beta1", {"sinkgd-0.9": near(4.49)})
    assert alone.headline == "SinkGD or both methods with momentum have no result yet."


# Lens ---------------------------------------------------------------------------------------------


def test_roughness_is_zero_on_a_straight_line():
    (arm,) = made_up(STUDIES["lens"], {"S1": [4.0]}).arms
    run = arm.seeds[0].run
    steps = [replace(run.steps[0], step=i, loss=5.0 - 0.1 * i) for i in range(10)]
    assert roughness(replace(run, steps=steps)) == pytest.approx(0, abs=1e-12)
    steps[7] = replace(steps[7], loss=steps[7].loss + 0.3)  # second differences .3, -.6, .3
    assert roughness(replace(run, steps=steps)) == pytest.approx((0.54 / 3) ** 0.5)
    assert roughness(replace(run, steps=steps[:2])) is None


def test_the_conditions_of_the_lens_are_judged_one_by_one():
    good = judge("lens", {"S0": near(4.0), "S1": near(3.9), "S2": near(4.1), "S3": apart(3.91)})
    assert good.headline == (
        "2 of 3 conditions hold (as good as S0, stable): S0 ended at 4.000, the best variant S1 "
        "ended at 3.900."
    )
    assert "Every variant is stable in every seed." in good.sentences
    assert good.sentences[-1] == (
        "Beside S1, sharper (S2, τ 0.05) harms and softer (S3, τ 0.2) makes no difference."
    )
    bad = judge("lens", {"S0": near(4.0), "S1": near(4.2), "S2": [float("inf")] * 3})
    assert bad.headline.startswith("0 of 3 conditions hold (none): ")
    assert "Unstable: S2." in bad.sentences
    assert judge("lens", {"S1": near(4.0)}).headline == "S0 has no result to compare with."


# Fine-tuning --------------------------------------------------------------------------------------


def tuned(new, old):
    """A run with losses on the new and on the old text after 0, 10, 20 and 100 steps.

    All losses on the new text are shifted, so that the last one stays.
    """

    def change(run: Run) -> Run:
        shift = run.evaluations[-1].val_loss - new[-1]
        rows = [
            Evaluation(step, 1000 * step, float(step), a + shift, 1.0, 1.0, 64, other_val_loss=b)
            for step, a, b in zip((0, 10, 20, 100), new, old, strict=True)
        ]
        return replace(run, evaluations=rows)

    return change


def test_finetune_compares_with_adamw_and_says_what_was_forgotten():
    losses = {
        "sinkgd": near(3.9),
        "rows-only": near(4.0),
        "lora-sinkgd": near(4.3),
        "adamw": near(4.1),
        "lora-adamw": near(4.2),
    }
    results = made_up(STUDIES["finetune"], losses)
    runs = {
        "sinkgd": tuned([5.0, 4.9, 4.8, 3.9], [4.0, 4.0, 4.1, 4.5]),
        "adamw": tuned([5.0, 5.25, 4.8, 4.1], [4.0, 4.4, 4.5, 4.75]),
    }
    results = with_runs(results, lambda arm, run: runs.get(arm, lambda same: same)(run))
    verdict = STUDIES["finetune"].judge(results)
    assert verdict.headline == "sinkgd ended 0.200 ± 0.000 lower than adamw."
    assert "rows-only ended 0.100 ± 0.000 lower than adamw." in verdict.sentences
    assert "lora-sinkgd ended 0.100 ± 0.000 higher than lora-adamw." in verdict.sentences
    assert (
        "sinkgd ended at 3.900 from 5.000; on the old text it went from 4.000 by +0.500, and its "
        "loss never rose within the first 20 steps."
    ) in verdict.sentences
    assert any("its loss rose by up to 0.250 within the first 20" in s for s in verdict.sentences)
    one = made_up(STUDIES["finetune"], {"sinkgd": near(3.9)})
    one = with_runs(one, lambda _, run: runs["sinkgd"](run))
    (chart,) = STUDIES["finetune"].charts(one, identify(one.analysis(None)))
    assert chart.description == "sinkgd new 3.900, old 4.500"


def test_a_rate_that_follows_another_is_in_every_point_and_in_the_record():
    arm = next(a for a in STUDIES["finetune"].settings["machine"].arms if a.name == "rows-only")
    points = arm.points()
    assert all(point["optimizer.matrix_lr"] == 0.3 * point["optimizer.lr"] for point in points)
    assert arm_from_json(arm.name, json.loads(json.dumps(arm_as_json(arm)))) == arm
