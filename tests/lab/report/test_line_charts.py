"""Line charts: statistics of models against tokens."""

import pytest

from lab.report.synthetic_runs import TOKENS_PER_STEP, write_run
from sinkgd.lab.report import analyze, build_page
from sinkgd.lab.report.figures import identify
from sinkgd.lab.report.line_charts import statistic_curve, statistics_charts
from sinkgd.lab.results import ModelStatistics


def with_statistics(folder, recipe, seed, values):
    run = write_run(folder, recipe, {10: 5.0, 20: 4.0}, seed=seed)
    run.statistics += [
        ModelStatistics(step, {"gate/mean": value, "gate/block_0": 0.0, "attention_share": 1.0})
        for step, value in values.items()
    ]
    return run


@pytest.fixture
def runs(tmp_path):
    return [
        with_statistics(tmp_path, "adamw", 0, {10: 1.0, 20: 2.0}),
        with_statistics(tmp_path, "adamw", 1, {10: 3.0, 20: 6.0}),
        with_statistics(tmp_path, "tempered", 0, {10: 0.5}),
    ]


def charts(runs):
    analysis = analyze(runs, "adamw")
    return statistics_charts(analysis, identify(analysis))


def test_the_curve_is_the_mean_over_runs_where_all_have_a_value(runs):
    curve = statistic_curve(runs[:2], "gate")
    assert curve.x == (10 * TOKENS_PER_STEP, 20 * TOKENS_PER_STEP)
    assert curve.y == (2.0, 4.0)
    assert statistic_curve(runs, "gate").x == (10 * TOKENS_PER_STEP,)
    assert statistic_curve(runs, "absent").x == ()


def test_there_is_a_chart_for_each_figure_with_a_line_a_run_and_their_mean(runs):
    (chart,) = charts(runs)
    assert (chart.key, chart.title) == ("inner-gate", "Gate")
    assert "adamw ends at 4.000, tempered ends at 0.500" in chart.description
    lines = [(trace["legendgroup"], trace["showlegend"]) for trace in chart.figure["data"]]
    assert lines.count(("adamw", False)) == 2
    assert lines.count(("adamw", True)) == 1
    assert lines.count(("tempered", False)) == 1


def test_runs_of_models_without_statistics_have_none(tmp_path):
    run = write_run(tmp_path, "adamw", {10: 5.0})
    assert charts([run]) == []


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path):
    run = with_statistics(tmp_path, "adamw", 0, {10: float("nan"), 20: 2.0})
    assert statistic_curve([run], "gate").y == (None, 2.0)


def test_the_page_has_them(runs):
    page = build_page(runs, baseline="adamw", title="T", command="C")
    assert 'id="inner-gate"' in page
