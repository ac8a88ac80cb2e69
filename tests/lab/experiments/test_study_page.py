"""Order, colors and headline of the arms on the page, in all studies."""

import re
from dataclasses import replace

import pytest

from lab.experiments.synthetic_study import SESSION, made_up, made_up_record
from sinkgd.lab.experiments.studies import STUDIES
from sinkgd.lab.experiments.study_report import arms_table, grid_table, reach_tables, study_page
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import Verdict, with_cost
from sinkgd.lab.report.bar_charts import bar_charts
from sinkgd.lab.report.figures import identify
from sinkgd.lab.report.quantities import ABSENT

GRAYS = (0, 9)  # the baseline, and those without a color
PLAIN = Verdict("It is so.", (), ())


def all_arms(study):
    """Results in which the arm that is listed first ended highest."""
    names = [arm.name for arm in study.settings["machine"].arms]
    return made_up(study, {name: [5 - 0.05 * i] * 2 for i, name in enumerate(names)})


@pytest.fixture(params=sorted(STUDIES))
def study(request):
    return STUDIES[request.param]


def test_the_adamw_with_one_rate_is_never_the_first_baseline(study):
    recipes = [one.arm.recipe for one in all_arms(study).controls]
    if "adamw" in recipes:
        assert recipes[0] != "adamw-one-lr"
        assert "adamw-one-lr" not in recipes[: recipes.index("adamw")]


def test_tables_and_charts_list_arms_by_result(study):
    results = all_arms(study)
    order = [one.arm.name for one in results.arms][::-1]
    assert [row[0].removesuffix(" (control)") for row in arms_table(results).rows] == order
    for control, sheet in zip(results.controls, reach_tables(results), strict=True):
        assert [row[0] for row in sheet.rows] == [n for n in order if n != control.arm.name]
    tuned = [name for name in order if results.arm(name).chosen is not None]
    assert list(dict.fromkeys(row[0] for row in grid_table(results).rows)) == tuned


def test_eight_arms_have_a_color_of_their_own_and_they_are_the_best(study):
    results = all_arms(study)
    baseline = next((one.arm.name for one in results.controls), None)
    looks = identify(results.analysis(baseline))
    colored = [name for name, look in looks.items() if look.series not in GRAYS]
    best = [one.arm.name for one in results.ranked if one.arm.name != baseline]
    assert colored == best[:8]
    assert len({looks[name].color for name in colored}) == len(colored)
    assert [name for name, look in looks.items() if look.series == 0] == (
        [baseline] if baseline else []
    )


def test_a_diverged_arm_is_last_and_has_no_color_before_others():
    study = STUDIES["table1"]
    names = [arm.name for arm in study.settings["machine"].arms]
    losses = {name: [4 + 0.01 * i] for i, name in enumerate(names)}
    losses["sinkgd"] = [float("inf")]
    results = made_up(study, losses)
    assert results.ranked[-1].arm.name == "sinkgd"
    assert identify(results.analysis("adamw"))["sinkgd"].series == 9


@pytest.mark.parametrize(
    ("loss", "pace", "words"),
    [
        (3.9, 1.0, "reached adamw’s final loss with 87 % of its tokens and 87 % of its time."),
        (3.8, 2.0, "reached adamw’s final loss with 75 % of its tokens but 150 % of its time."),
        (4.1, 1.0, "did not reach adamw’s final loss."),
        ((3.9, 4.05), 1.0, None),  # level
        (4.0, 1.0, None),
    ],
)
def test_the_headline_says_tokens_and_time(loss, pace, words):
    own = list(loss) if isinstance(loss, tuple) else [loss] * 2
    losses = {"sinkgd": own, "adamw": [4.0] * 2, "adamw-one-lr": [5.0] * 2}
    results = made_up(STUDIES["table1"], losses, step_seconds={"sinkgd": pace})
    said = with_cost(results, PLAIN).headline.replace("\N{NO-BREAK SPACE}", " ")
    assert said == (f"It is so. sinkgd {words}" if words else PLAIN.headline)


def test_an_arm_of_which_one_seed_falls_short_has_no_share():
    losses = {"sinkgd": [3.90, 3.91, 4.02], "adamw": [4.0, 4.01, 4.10], "adamw-one-lr": [5.0] * 3}
    said = with_cost(made_up(STUDIES["table1"], losses), PLAIN).headline
    assert "% of its tokens" in said
    losses["sinkgd"][2] = 4.05
    said = with_cost(made_up(STUDIES["table1"], losses), PLAIN).headline
    assert said == "It is so. sinkgd reached adamw’s final loss in 2 of 3 seeds."


def test_the_share_seed_by_seed_is_in_the_table_even_if_an_arm_ends_higher():
    losses = {
        "sinkgd": [3.9, 3.8],  # 87.5 % and 75 %
        "muon": [4.1, 4.1],  # reached by AdamW with 87.5 %
        "swan": [3.88],  # 85 %
        "scale": [3.9, float("inf")],
        "adamw": [4.0, 4.0],
    }
    tables = reach_tables(made_up(STUDIES["table1"], losses))
    table = next(one for one in tables if "adamw’s" in one.title)
    found = {row[0]: row[3].replace("\N{NO-BREAK SPACE}", " ") for row in table.rows}
    assert found["sinkgd"].startswith("81 % (")
    assert found["muon"] == "114 % (114 to 114 %)"
    assert found["swan"] == "85 %"
    assert found["scale"] == ABSENT


@pytest.mark.parametrize("change", ["slower", "other jobs", "other processors"])
def test_times_that_cannot_be_compared_are_nowhere(change):
    study = STUDIES["table1"]
    record = made_up_record(study, {"sinkgd": [3.8] * 2, "adamw": [4.0] * 2})
    if change == "slower":
        run = record.runs["sinkgd-seed0"].run
        run.steps[:] = [replace(step, step_seconds=3 * step.step_seconds) for step in run.steps]
    elif change == "other jobs":
        record.sessions.append(replace(SESSION, jobs=SESSION.jobs + 1))
    else:
        environments = [{**SESSION.environment, "cpu": cpu} for cpu in ("one", "another")]
        record.sessions[:] = [replace(SESSION, environment=one) for one in environments]
    results = StudyResults.of(record)
    verdict = with_cost(results, study.judge(results))
    said = " ".join([verdict.headline, *verdict.sentences])
    assert "of its tokens." in said
    assert not any(word in said for word in ("time", "seconds", "throughput"))
    assert any("times" in caution for caution in verdict.cautions)
    assert {row[3] for row in arms_table(results).rows} == {ABSENT}
    assert {row[4:] for table in reach_tables(results) for row in table.rows} == {(ABSENT,) * 3}


def test_the_headline_compares_like_with_like_alone():
    losses = {"adamw-batch4": [4.0], "sinkgd-batch64": [3.0]}
    record = made_up_record(STUDIES["batch"], losses)
    for result in record.runs.values():
        if result.arm == "sinkgd-batch64":
            object.__setattr__(result.run.start, "tokens_per_step", 64_000)
    assert with_cost(StudyResults.of(record), PLAIN) == PLAIN


def test_charts_that_remake_the_papers_figure_say_so():
    results = all_arms(STUDIES["table1"])
    analysis = results.analysis("adamw")
    remade = {chart.key for chart in bar_charts(analysis, identify(analysis))
              if "figure 1 of the SinkGD paper" in chart.caption}  # fmt: skip
    assert remade == {"tokens-to-reach", "throughput", "memory"}


def test_models_of_other_sizes_are_not_compared():
    study = STUDIES["ladder"]
    losses = {"adamw-nano-32": [4.0], "sinkgd-nano-32": [3.9], "sinkgd-nano-48": [3.8]}
    record = made_up_record(study, losses)
    for name, result in record.runs.items():
        if result.arm == "sinkgd-nano-48":
            model = {"model": {"preset": "llama-nano-48"}}
            start = replace(result.run.start, config=result.run.start.config | model)
            record.runs[name] = replace(result, run=replace(result.run, start=start))
    results = StudyResults.of(record)
    (table,) = reach_tables(results)
    assert [row[0] for row in table.rows] == ["sinkgd-nano-32"]
    assert {row[3] for row in arms_table(results).rows} == {ABSENT}  # at equal seconds
    page = study_page(study, record, results, study.judge(results))
    assert "tokens-to-reach" not in page


def test_every_cell_names_its_column_for_phones():
    study = STUDIES["table1"]
    record = made_up_record(study, {"sinkgd": [4.0], "adamw": [4.1]})
    results = StudyResults.of(record)
    page = study_page(study, record, results, study.judge(results))
    for table in re.findall(r'<table class="numbers text-table.*?</table>', page, re.S):
        assert "<td>" not in table
