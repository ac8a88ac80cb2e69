"""The study `ladder`: its rules and its verdict."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lab.experiments.synthetic_study import made_up, made_up_record
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.studies.ladder_arms import (
    GRIDS,
    PAPER_GRIDS,
    TOKENS_PER_WEIGHT,
    hidden_weights,
)
from sinkgd.lab.experiments.studies.ladder_shares import fit_of, shares, trend_of
from sinkgd.lab.experiments.study import plan_of
from sinkgd.lab.experiments.study_report import study_page
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import with_cost
from sinkgd.lab.models.presets import preset_config
from sinkgd.lab.report.figures import identify

LADDER = STUDIES["ladder"]
SIZES = ("nano-32", "nano-48", "nano-64", "nano-96")
MATRIX_LR = "optimizer.matrix_lr"


def of(arms, method):
    return [arm for arm in arms if arm.series == method]


def test_a_run_takes_twenty_tokens_a_hidden_weight_in_batches_of_the_square_root():
    plan = plan_of(LADDER, "machine")
    for arm, task in zip(plan.arms, plan.first_tasks(), strict=True):
        config = plan.config(task)
        weights = hidden_weights(arm.overrides["model.preset"])
        assert arm.value == weights
        tokens = config.training.steps * config.tokens_per_step
        assert tokens == pytest.approx(TOKENS_PER_WEIGHT * weights, rel=0.01)
        batch = 16 * (weights / plan.arms[0].value) ** 0.5
        assert config.training.batch_size == pytest.approx(batch, abs=2)


@pytest.mark.parametrize("scale", ["machine", "paper"])
def test_rates_of_matrices_shrink_as_the_width_except_muons(scale):
    plan, grids = plan_of(LADDER, scale), GRIDS if scale == "machine" else PAPER_GRIDS
    for recipe in grids:
        own = of(plan.arms, recipe)
        assert [bool(arm.tuned) for arm in own] == [True, True, False, False]
        assert own[0].tuned == own[1].tuned == grids[recipe]
        assert [arm.widened for arm in own] == [True, True, False, False]
        width = preset_config(own[1].overrides["model.preset"]).hidden_size
        for arm in own[2:]:
            here = preset_config(arm.overrides["model.preset"]).hidden_size
            expected = 1.0 if recipe.startswith("muon") else width / here
            assert arm.carried.arm == own[1].name
            assert arm.carried.factors == {MATRIX_LR: expected}
        assert own[2].carried.tried == (1.0,)
        assert own[3].carried.tried == (0.5, 1.0, 2.0)


def results_of(gains, better=()):
    """AdamW's losses fall with the size; SinkGD's are lower by the gain of each size.

    Those of AdamW with a beta1 of 0.5 are lower by what is given in ``better``.
    """
    losses = {}
    for place, (size, gain) in enumerate(zip(SIZES, gains, strict=True)):
        base = 5.0 - 0.4 * place
        losses[f"adamw-{size}"] = [base, base + 0.01]
        losses[f"sinkgd-{size}"] = [base - gain, base + 0.01 - gain]
        if better:
            losses[f"adamw-0.5-{size}"] = [base - better[place], base + 0.01 - better[place]]
    return made_up(LADDER, losses)


def plain(words):
    return words.replace("\N{NO-BREAK SPACE}", " ")


def test_shares_of_tokens_come_from_the_curves_seed_by_seed():
    # A run falls by 0.4 from half to three quarters of its tokens, and by 0.2 in the last quarter.
    found = shares(results_of((0.2, 0.1, 0.4, 0.0)), "sinkgd")
    by_size = [0.75, 0.875, 0.625, 1.0]
    sizes = [hidden_weights(f"llama-{size}") for size in SIZES]
    assert list(found) == sizes
    for size, share in zip(sizes, by_size, strict=True):
        assert found[size] == pytest.approx([share, share])


def test_the_better_adamw_of_each_size_counts():
    results = results_of((0.2, 0.2, 0.2, 0.2), better=(0.0, 0.1, 0.2, -0.1))
    found = list(shares(results, "sinkgd").values())
    for shown, expected in zip(found, (0.75, 0.875, 1.0, 0.75), strict=True):
        assert shown == pytest.approx([expected] * 2)


def changed(results, arm, change):
    """Return the results with ``change`` applied to those of one arm."""
    arms = tuple(change(one) if one.arm.name == arm else one for one in results.arms)
    return replace(results, arms=arms)


def failed(result):
    """The same run, but it diverged after its last evaluation."""
    return replace(result, run=replace(result.run, end=replace(result.run.end, status="failed")))


def diverges(one):
    """An arm's results, but its second seed diverged."""
    return replace(one, seeds=(one.seeds[0], failed(one.seeds[1])))


def test_above_adamws_loss_the_share_is_the_inverse_of_adamws():
    ahead, behind = results_of((0.1, 0.2, 0.3, 0.4)), results_of((-0.1, -0.2, -0.3, -0.4))
    pairs = zip(shares(ahead, "sinkgd").values(), shares(behind, "sinkgd").values(), strict=True)
    for less, more in pairs:
        assert less == pytest.approx([1 / q for q in more])
        assert max(less) < 1 < min(more)
    one, other = trend_of(ahead, "sinkgd"), trend_of(behind, "sinkgd")
    assert one.doubling == pytest.approx(1 / other.doubling)
    assert one.far_low == pytest.approx(1 / other.far_high)


@pytest.mark.parametrize("size", SIZES)
def test_a_seed_that_diverged_is_counted_and_there_is_no_trend(size):
    results = changed(results_of((0.1, 0.1, 0.1, 0.1)), f"sinkgd-{size}", diverges)
    found = shares(results, "sinkgd")
    assert list(found) == [hidden_weights(f"llama-{size}") for size in SIZES]
    for n, own in found.items():
        assert np.isinf(own).tolist() == [False, n == hidden_weights(f"llama-{size}")]
    assert trend_of(results, "sinkgd") is None
    headline = LADDER.judge(results).headline
    assert headline.count("(failed in 1 of 2 seeds)") == 1
    assert headline.endswith("no trend, because a run failed.")


@pytest.mark.parametrize("size", SIZES)
def test_an_adamw_that_diverged_in_a_seed_stays_the_better_one_and_there_is_no_trend(size):
    results = results_of((0.2, 0.2, 0.2, 0.2), better=(0.1, 0.1, 0.1, 0.1))
    results = changed(results, f"adamw-0.5-{size}", diverges)
    found = shares(results, "sinkgd")
    assert [q[0] for q in found.values()] == pytest.approx([0.875] * 4)
    for n, own in found.items():
        assert np.isnan(own).tolist() == [False, n == hidden_weights(f"llama-{size}")]
    assert trend_of(results, "sinkgd") is None
    assert "(AdamW failed in 1 of 2 seeds)" in LADDER.judge(results).headline


def test_an_adamw_that_diverged_at_every_rate_is_not_the_better_one():
    results = changed(
        results_of((0.2, 0.2, 0.2, 0.2), better=(0.1, 0.1, 0.1, 0.1)),
        f"adamw-0.5-{SIZES[0]}",
        lambda one: replace(one, seeds=(), grid=tuple(map(failed, one.grid))),
    )
    assert [q[0] for q in shares(results, "sinkgd").values()] == pytest.approx(
        [0.75, 0.875, 0.875, 0.875]
    )


@pytest.mark.parametrize("method", ["adamw", "adamw-0.5"])
@pytest.mark.parametrize("size", SIZES)
def test_there_is_no_share_before_both_adamws_have_run_a_size(method, size):
    results = results_of((0.2, 0.2, 0.2, 0.2), better=(0.1, 0.1, 0.1, 0.1))
    results = changed(results, f"{method}-{size}", lambda one: replace(one, seeds=()))
    assert hidden_weights(f"llama-{size}") not in shares(results, "sinkgd")
    assert trend_of(results, "sinkgd") is None
    assert LADDER.judge(results).headline.endswith("no trend yet.")


@pytest.mark.parametrize(("gap", "unknown"), [(1.6, np.isinf), (-1.6, np.isnan)])
def test_a_loss_beyond_the_first_evaluation_gives_no_share(gap, unknown):
    # A run's first evaluation is 1.5 above its end.
    results = results_of((0.1, 0.1, 0.1, -gap))
    assert unknown(list(shares(results, "sinkgd").values())[-1]).all()
    assert trend_of(results, "sinkgd") is None
    verdict = LADDER.judge(results)
    assert "failed in 2 of 2 seeds at" in verdict.headline
    assert any(words.startswith("A run failed if") for words in verdict.sentences)


def test_adamws_are_compared_over_the_seeds_that_both_have():
    results = results_of((0.2, 0.2, 0.2, 0.2), better=(-0.002, -0.002, -0.002, -0.002))
    results = changed(results, f"adamw-0.5-{SIZES[0]}", lambda o: replace(o, seeds=o.seeds[:1]))
    assert [len(own) for own in shares(results, "sinkgd").values()] == [2, 2, 2, 2]


def test_the_headline_names_the_better_adamw():
    results = results_of((0.2, 0.2, 0.2, 0.2), better=(0.1, 0.1, 0.1, 0.1))
    headline = with_cost(results, LADDER.judge(results)).headline
    assert "reached adamw-0.5-" in headline
    assert "reached adamw-nano" not in headline


def test_a_method_that_diverged_at_every_rate_of_a_grid_is_not_left_out():
    results = changed(
        results_of((0.1, 0.1, 0.1, 0.1)),
        f"sinkgd-{SIZES[0]}",
        lambda one: replace(one, seeds=(), grid=tuple(map(failed, one.grid))),
    )
    assert np.isinf(shares(results, "sinkgd")[hidden_weights(f"llama-{SIZES[0]}")]).all()
    assert trend_of(results, "sinkgd") is None
    assert "tokens: failed in 2 of 2 seeds at 50.2k" in plain(LADDER.judge(results).headline)


def test_a_seed_that_adamw_has_not_run_does_not_count():
    results = changed(
        results_of((0.1, 0.1, 0.1, 0.1)),
        f"adamw-{SIZES[0]}",
        lambda one: replace(one, seeds=one.seeds[:1]),
    )
    assert [len(own) for own in shares(results, "sinkgd").values()] == [1, 2, 2, 2]
    assert trend_of(results, "sinkgd") is not None


def test_the_trend_is_a_line_through_the_shares():
    found = trend_of(results_of((0.1, 0.1, 0.1, 0.1)), "sinkgd")
    assert found.doubling == pytest.approx(1.0)
    assert found.far == pytest.approx(0.875)
    falling = trend_of(results_of((0.0, 0.1, 0.2, 0.3)), "sinkgd")
    assert falling.doubling_high < 1
    assert falling.far < 0.5


def test_there_is_no_trend_before_every_size_has_a_run():
    results = results_of((0.0, 0.1, 0.2, 0.3))
    for method in ("sinkgd", "adamw"):
        found = changed(results, f"{method}-{SIZES[-1]}", lambda one: replace(one, seeds=()))
        assert trend_of(found, "sinkgd") is None
        assert LADDER.judge(found).headline.endswith("hidden weights; no trend yet.")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ((0.0, 0.1, 0.2, 0.3), "falls as the model grows: 100 % at"),
        ((0.3, 0.2, 0.1, 0.0), "rises as the model grows: 69 % at"),
        ((0.1, 0.1, 0.1, 0.1), "does not change measurably with the size: 88 % at"),
        ((-0.1, -0.1, -0.1, -0.1), "does not change measurably with the size: 114 % at"),
        ((-0.1, -0.1, -0.1, -0.1), "114 % at 452k (above 100 %: not reached); a factor of"),
    ],
)
def test_the_verdict_says_which_way_the_share_moves(gains, words):
    results = results_of(gains)
    verdict = LADDER.judge(results)
    assert words in plain(verdict.headline)
    assert re.search(
        r"; a factor of [\d.]+ \([\d.]+ to [\d.]+\) for each doubling\.$", verdict.headline
    )
    charts = LADDER.charts(results, identify(results.analysis(None)))
    assert len(charts) == 1


def test_only_a_trend_of_smaller_models_is_extrapolated():
    results = results_of((0.1, 0.1, 0.1, 0.1))
    assert any("held up to llama-60m" in words for words in LADDER.judge(results).sentences)
    larger = [replace(one, arm=replace(one.arm, value=1e3 * one.arm.value)) for one in results.arms]
    sentences = LADDER.judge(replace(results, arms=tuple(larger))).sentences
    assert any(words.startswith("With each doubling") for words in sentences)
    assert not any("held up to" in words for words in sentences)


def test_nothing_is_said_of_a_method_before_both_have_a_run():
    results = results_of((0.1, 0.1, 0.1, 0.1))
    first = replace(results, arms=tuple(a for a in results.arms if a.arm.series == "sinkgd")[:1])
    headline = LADDER.judge(first).headline
    assert headline == "sinkgd and AdamW have no results at the same size yet."


def test_the_part_of_the_width_that_is_deflated_is_stated():
    def recorded(one, width):
        own = [
            replace(r, run=replace(r.run, start=replace(
                r.run.start,
                config={"optimizer": {"deflated_rank": 15}},
                inputs={"model": {"hidden_size": width}},
            )))
            for r in one.seeds
        ]  # fmt: skip
        return replace(one, seeds=tuple(own))

    results = results_of((0.1, 0.1, 0.1, 0.1))
    assert not any("deflates" in words for words in LADDER.judge(results).sentences)
    for size in SIZES:
        width = int(size.removeprefix("nano-"))
        results = changed(results, f"sinkgd-{size}", lambda one, width=width: recorded(one, width))
    last = plain(LADDER.judge(results).sentences[-1])
    assert "15 directions at every size: 47 % of the smallest width and 16 % of the largest" in last


def test_an_exponent_needs_four_sizes():
    results = results_of((0.1, 0.1, 0.1, 0.1))
    assert fit_of(results, "adamw") is not None
    assert fit_of(replace(results, arms=results.arms[:6]), "adamw") is None
    assert fit_of(results, "muon") is None


def test_an_arm_without_a_result_takes_no_chart_from_the_page():
    losses = {"adamw-nano-32": [5.0, 5.1], "sinkgd-nano-32": [4.8, 4.9], "muon-nano-32": []}
    record = made_up_record(LADDER, losses)
    results = StudyResults.of(record)
    page = study_page(LADDER, record, results, LADDER.judge(results))
    assert "share-by-size" in page
    assert 'id="grids"' in page
