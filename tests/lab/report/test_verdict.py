"""The words follow from the numbers, in every case, ties and doubts included."""

import re

import pytest

from lab.report.synthetic_runs import write_run
from sinkgd.lab.cli import main
from sinkgd.lab.report import analyze
from sinkgd.lab.report.page import cards
from sinkgd.lab.report.tables import summary_rows
from sinkgd.lab.report.verdict import judge
from sinkgd.lab.results import Run


def headline(runs, baseline="adamw"):
    return judge(analyze(runs, baseline)).headline.replace("\N{NO-BREAK SPACE}", " ")


def cautions(runs, baseline="adamw"):
    return judge(analyze(runs, baseline)).cautions


@pytest.fixture
def adamw(tmp_path):
    return write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0})


def test_a_recipe_that_reached_the_loss(tmp_path, adamw):
    sinkgd = write_run(tmp_path, "sinkgd", {5: 5.0, 15: 3.0})
    assert headline([adamw, sinkgd]) == (
        "sinkgd reached adamw’s final loss of 4.000 with 50 % of its tokens and 50 % of its time"
    )


def test_fewer_tokens_in_more_time_says_but(tmp_path, adamw):
    seconds = {"step_seconds": 3.0, "optimizer_seconds": 2.25}
    sinkgd = write_run(tmp_path, "sinkgd", {5: 5.0, 15: 3.0}, **seconds)
    assert headline([adamw, sinkgd]).endswith("50 % of its tokens but 150 % of its time")


def test_a_recipe_that_did_not_reach_the_loss(tmp_path, adamw):
    verdict = judge(analyze([adamw, write_run(tmp_path, "sinkgd", {20: 4.25})], "adamw"))
    assert verdict.headline == "sinkgd did not reach adamw’s final loss of 4.000"
    assert verdict.sentences["sinkgd"] == (
        "Did not reach the baseline’s final loss. It ended at 4.250, 0.250 higher."
    )


def test_recipes_within_the_spread_of_seeds_are_a_tie(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: x}, seed=i) for i, x in enumerate([3.9, 4.1])]
    runs += [write_run(tmp_path, "sinkgd", {20: x}, seed=i) for i, x in enumerate([3.85, 4.1])]
    assert headline(runs) == "sinkgd ended level with adamw at 4.000"
    assert "no difference beyond the spread" in judge(analyze(runs, "adamw")).sentences["sinkgd"]


def test_several_recipes_are_told_apart(tmp_path, adamw):
    runs = [
        adamw,
        write_run(tmp_path, "swan", {5: 5.0, 15: 3.0}),
        write_run(tmp_path, "sinkgd", {10: 5.0, 20: 3.0}),
        write_run(tmp_path, "same", {20: 4.0}),
        write_run(tmp_path, "sgd", {20: 7.0}),
    ]
    assert headline(runs) == (
        "swan and sinkgd reached adamw’s final loss of 4.000 with 50 % and 75 % of its tokens, "
        "and 50 % and 75 % of its time; "
        "same ended level; sgd did not reach it"
    )


def test_some_seeds_that_reached_the_loss_are_counted(tmp_path, adamw):
    runs = [adamw, *(write_run(tmp_path, "adamw", {20: 4.0}, seed=i) for i in (1, 2))]
    # The second seed dips below the target and ends, like the first, well above it.
    runs.append(write_run(tmp_path, "sinkgd", {20: 4.5}))
    runs.append(write_run(tmp_path, "sinkgd", {5: 5.0, 15: 3.0, 20: 4.5}, seed=1))
    assert headline(runs).endswith("in 1 of 2 runs")
    assert "Only 1 of 2 runs" in judge(analyze(runs, "adamw")).sentences["sinkgd"]


def test_without_a_baseline_the_lowest_is_named(tmp_path, adamw):
    sinkgd = write_run(tmp_path, "sinkgd", {20: 3.0})
    assert headline([adamw, sinkgd], None) == "sinkgd ended lowest, at a validation loss of 3.000"


def test_a_single_run_is_no_comparison(adamw):
    assert headline([adamw], None) == "adamw ended at a validation loss of 4.000"
    assert headline([adamw]) == "adamw ended at 4.000; nothing to compare it with yet"


def test_nothing_finished_is_said(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: 4.0}, status=None)]
    assert headline(runs) == "adamw, the baseline, has no finite final loss to compare with"
    assert headline(runs, None) == "No run has finished yet"
    assert judge(analyze(runs, None)).sentences["adamw"] == "No result: unfinished."


def test_a_single_seed_is_a_caution_and_three_are_none(tmp_path, adamw):
    [caution] = cautions([adamw, write_run(tmp_path, "sinkgd", {20: 3.0})])
    assert caution.startswith("Each recipe has a single seed")
    seeds = [write_run(tmp_path / "three", "adamw", {20: 4.0}, seed=i) for i in range(3)]
    assert cautions(seeds) == ()


def test_recipes_without_common_seeds_are_a_caution(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: x}, seed=i) for i, x in enumerate([3.9, 4.1])]
    runs += [write_run(tmp_path, "sinkgd", {20: x}, seed=i) for i, x in enumerate([3.8, 4.0], 1)]
    found = [words for words in judge(analyze(runs, "adamw")).cautions if "seeds" in words]
    assert found == [
        "sinkgd shares fewer than two seeds with adamw, so which differences are chance is "
        "unknown: run the same seeds for each recipe."
    ]


def test_runs_that_did_not_finish_are_cautions_with_their_reason(tmp_path, adamw):
    failed = write_run(
        tmp_path, "sinkgd", {5: 9.0}, status="failed", message="the loss is NaN", name="broken"
    )
    assert "broken failed at step 5 and is in no average: the loss is NaN" in cautions(
        [adamw, failed]
    )
    live = write_run(tmp_path, "sinkgd", {7: 9.0}, status=None, name="live")
    assert "live is unfinished at step 7 and is in no average" in cautions([adamw, live])


def test_unequal_runs_are_a_caution(tmp_path, adamw):
    other = write_run(tmp_path, "sinkgd", {30: 3.0}, parameters=2000)
    assert "The runs are not comparable: they differ in model size and total tokens." in cautions(
        [adamw, other]
    )


@pytest.mark.parametrize(
    ("step_seconds", "optimizer_seconds", "start", "warns"),
    [
        (2.0, 0.25, {}, True),
        (0.5, 0.25, {}, True),
        (1.2, 0.25, {}, False),
        (3.0, 2.25, {}, False),  # the optimizer itself may take longer
        (2.0, 0.25, {"parameters": 2000}, False),  # a larger model does, too
    ],
)
def test_runs_at_unequal_speeds_are_a_caution(
    tmp_path, adamw, step_seconds, optimizer_seconds, start, warns
):
    seconds = {"step_seconds": step_seconds, "optimizer_seconds": optimizer_seconds}
    other = write_run(tmp_path, "sinkgd", {20: 3.0}, **seconds, **start)
    assert any("Do not compare times" in text for text in cautions([adamw, other])) is warns


def test_the_terminal_shows_the_cautions_of_the_page(tmp_path, adamw, capsys):
    write_run(tmp_path, "sinkgd", {20: 3.0}, step_seconds=4.0)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "beware: Each recipe has a single seed" in shown
    assert "Do not compare times and tokens per second" in shown


def test_a_baseline_that_got_worse_at_the_end_is_a_caution(tmp_path):
    adamw = write_run(tmp_path, "adamw", {10: 4.0, 15: 3.0, 20: 4.0})
    sinkgd = write_run(tmp_path, "sinkgd", {20: 3.5})
    assert any("50\N{NO-BREAK SPACE}% of its tokens" in text for text in cautions([adamw, sinkgd]))


@pytest.mark.parametrize("final", [4.25, 3.0])
def test_the_papers_sinkgd_is_told_apart_from_the_default(tmp_path, adamw, final):
    runs = [
        adamw,
        write_run(tmp_path, "sinkgd", {10: 3.0, 20: 3.0}),
        write_run(tmp_path, "sinkgd-paper", {20: final}),
    ]
    said = headline(runs)
    assert said.startswith("sinkgd and" if final < 4 else "sinkgd reached")
    assert "sinkgd-paper (without deflation)" in said


def test_times_that_cannot_be_compared_are_in_no_headline_and_on_no_card(tmp_path, adamw):
    runs = [adamw, write_run(tmp_path, "sinkgd", {5: 5.0, 15: 3.0}, step_seconds=3.0)]
    verdict = judge(analyze(runs, "adamw"))
    assert any("Do not compare times" in text for text in verdict.cautions)
    assert headline(runs).endswith("of 4.000 with 50 % of its tokens")
    sinkgd, _ = cards(analyze(runs, "adamw"), verdict)
    notes = {figure.name: (figure.value, figure.note) for figure in sinkgd.figures}
    assert notes["Time needed"] == notes["Effective throughput"] == ("–", "not comparable")
    [time] = [row for row in summary_rows(analyze(runs, "adamw")) if row.title == "Time to reach"]
    assert time.cells[1].replace("\N{NO-BREAK SPACE}", " ") == "30.0 s"


@pytest.mark.parametrize("resumed", [True, False])
def test_other_threads_are_named_where_the_speed_is_unequal(tmp_path, resumed):
    adamw = write_run(tmp_path, "adamw", {20: 4.0}, environment={"threads": 2})
    began_with = {"threads": 2 if resumed else 1}
    slow = write_run(tmp_path, "sinkgd", {20: 3.0}, step_seconds=2.0, environment=began_with)
    if resumed:
        first, *rest = slow.path.read_text(encoding="utf-8").splitlines()
        resume = '{"kind": "resume", "step": 0, "changed": {"threads": [2, 1], "commit": ["a", 1]}}'
        slow.path.write_text("\n".join([first, resume, *rest, ""]), encoding="utf-8")
    [said] = [text for text in cautions([adamw, Run.read(slow.path)]) if "Do not compare" in text]
    changed = "sinkgd-seed0 went on after step 0 with threads 1 instead of 2. Do not compare"
    assert (changed if resumed else "compute the same in it: threads was 2 and 1.") in said
    assert not re.search("other work|commit", said)
