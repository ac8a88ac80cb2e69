"""The table in a terminal fits it, however many recipes there are."""

import io

import pytest
from rich.console import Console

from lab.report.synthetic_runs import write_run
from sinkgd.lab.report import analyze, summary_tables

RECIPES = ["adamw", *(f"recipe-{i}-with-a-long-name" for i in range(7))]


def printed(tmp_path, width, baseline="adamw"):
    runs = [write_run(tmp_path, name, {10: 5.0, 20: 4.0}) for name in RECIPES]
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_tables(analyze(runs, baseline), console.width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120, 200, 400])
def test_every_recipe_has_its_loss_in_whole_columns(tmp_path, width):
    lines = printed(tmp_path, width)
    heads = [line.split() for line in lines if "recipe-" in line]
    losses = [line.split()[2:] for line in lines if line.startswith("Validation loss")]
    assert [name for head in heads for name in head if "recipe-" in name] == RECIPES[1:]
    assert all(head[:2] == ["adamw", "(baseline)"] for head in heads)
    assert [len(own) for own in losses] == [len(head) - 1 for head in heads]
    assert {loss for own in losses for loss in own} == {"4.000"}
    assert max(map(len, lines)) <= width
    assert (len(heads) == 1) == (width == 400)


def test_without_a_baseline_every_table_has_recipes_alone(tmp_path):
    heads = [line.split() for line in printed(tmp_path, 100, None) if "recipe-" in line]
    assert [name for head in heads for name in head] == RECIPES


def test_a_terminal_too_narrow_for_any_has_one_at_a_time(tmp_path):
    assert sum("Validation" in line for line in printed(tmp_path, 60)) == 7
