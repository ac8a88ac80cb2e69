"""The published table is whole, says where figures are from, and keeps apart what is measured."""

import re

import pytest

from lab.report.synthetic_runs import write_run
from lab.report.test_page import HOSTILE, Parsed, build
from sinkgd.lab.report import calculator_block, published_block
from sinkgd.lab.report.published import (
    LARGEST,
    LONGER,
    ROWS,
    SIZES,
    SPEEDUPS,
    THROUGHPUT,
    Provenance,
    State,
    memory_gib,
)
from sinkgd.lab.report.published_charts import memory_charts, spread_out
from sinkgd.lab.report.shell import render

# Rows of the papers' tables, method by method, from 60M to 1.3B.
PRINTED = """
33.94 25.03 19.24 16.44 / 34.06 25.08 18.80 15.56 / 30.05 23.13 18.77 16.52
34.88 25.36 18.95 15.64 / 31.06 22.73 17.03 14.31 / 31.93 23.84 17.18 14.17
31.26 22.84 16.67 14.10 / 30.00 22.83 17.14 14.42 / 30.25 22.67 16.51 13.52
28.86 22.20 16.70 14.18 / 28.77 22.20 16.80 13.97 / 30.81 22.57 16.32 14.25
≤31.0 – 16.5 13.5
"""
# Of the benchmark, GiB: Adam, SinkGD and its like, Muon, SGD; from 60M to 7B.
MEMORY = {
    State.MOMENTS: (0.325, 0.749, 2.056, 7.483, 37.65),
    State.NONE_IN_BLOCKS: (0.230, 0.433, 0.930, 2.983, 13.53),
    State.MATRIX_MOMENTUM: (0.277, 0.591, 1.493, 5.233, 25.59),
    State.NOTHING: (0.108, 0.250, 0.685, 2.494, 12.55),
}
BENCHMARK = {"config": {"model": {"preset": "llama-60m"}, "data": {"corpus": "shards/c4"}}}


def test_the_table_has_every_figure_of_the_papers():
    lines = [line.split() for line in re.split(r"[/\n]", PRINTED.strip())]
    assert len(ROWS) == len(lines) == 13
    block = published_block([])
    for row, printed in zip(block.rows, lines, strict=True):
        cells = [cell.text.replace("\xa0", "") if cell else "–" for cell in row.cells]
        assert cells == printed, row.method
    assert sum(cell is not None for row in block.rows for cell in row.cells) == 51
    assert [len(LONGER), len(SPEEDUPS), len(THROUGHPUT)] == [3, 4, 3]


def test_every_row_has_a_paper_and_says_who_ran_it():
    assert all(re.fullmatch(r"\d{4}\.\d{5}", row.source.arxiv) for row in ROWS)
    assert len({row.source.arxiv for row in ROWS}) == 7
    assert len({row.key for row in ROWS}) == 13
    origins = {row.key: row.origin.arxiv for row in ROWS if row.origin}
    assert origins == {
        "adam-sinkgd": "1412.6980",
        "adam-galore": "1412.6980",
        "adam-tuned": "1412.6980",
        "muon": "2502.16982",
        "stable-spam": "2502.17055",
    }
    others = {row.key for row in ROWS if row.provenance is Provenance.OTHERS}
    assert others == {"adam-sinkgd", "adam-tuned", "muon", "stable-spam"}
    assert [row.key for row in ROWS if row.provenance is Provenance.CITED] == ["adam-galore"]


def test_the_benchmark_trains_as_long_as_it_says():
    columns = [column.training.replace("\xa0", " ") for column in published_block([]).columns]
    assert columns == [
        "10k steps, 1.31B tokens",
        "20k steps, 2.62B tokens",
        "60k steps, 7.86B tokens",
        "100k steps, 13.1B tokens",
    ]


@pytest.mark.parametrize("state", MEMORY, ids=lambda state: state.name)
def test_the_formula_gives_the_published_memory(state):
    found = [memory_gib(size, state) for size in (*SIZES, LARGEST)]
    assert found == pytest.approx(MEMORY[state], rel=2e-3)


def test_only_the_lowest_of_a_size_is_marked_and_a_plot_is_not_trusted_to_its_digit():
    marked = [
        (row.method, column.size)
        for row in published_block([]).rows
        for cell, column in zip(row.cells, published_block([]).columns, strict=True)
        if cell and cell.lowest
    ]
    assert sorted(marked) == [
        ("Muon", "130M"),
        ("RACS", "1.3B"),
        ("SCALE", "350M"),
        ("SinkGD", "1.3B"),  # 13.5 off a plot is not told from 13.52
        ("Stable-SPAM", "130M"),
        ("Stable-SPAM", "60M"),
    ]


def test_a_chart_a_size_has_a_name_for_every_point():
    charts = memory_charts()
    assert [chart.title for chart in charts] == [
        f"{size}, published" for size in ("60M", "130M", "350M", "1.3B")
    ]
    for chart, points in zip(charts, (10, 9, 10, 10), strict=True):
        assert len(chart.figure["data"][0]["x"]) == points
        assert len(chart.figure["layout"]["annotations"]) == points
    assert "SinkGD about 16.5 in 0.93 GiB" in charts[2].description
    assert "SinkGD at most 31 in " in charts[0].description


def test_labels_are_apart_and_as_near_as_can_be():
    assert spread_out([0, 1, 2, 50], 10) == [-9.0, 1.0, 11.0, 50.0]
    assert spread_out([0, 20], 10) == [0, 20]


def test_a_run_of_the_benchmark_stands_in_its_column(tmp_path):
    runs = [
        write_run(tmp_path, "sinkgd", {20: 3.4}, parameters=58_073_600, **BENCHMARK),
        write_run(tmp_path, "sinkgd", {20: 3.5}, seed=1, parameters=58_125_000, **BENCHMARK),
        write_run(tmp_path, "adamw", {5: 4.0}, parameters=58_073_600, status="failed", **BENCHMARK),
    ]
    (row,) = published_block(runs).measured
    assert (row.recipe, row.size) == ("sinkgd", "60M")
    assert row.perplexity.replace("\xa0", " ") == "31.54 ± 1.58"  # e^3.4 = 29.964, e^3.5 = 33.115
    assert row.note == "2 seeds, 2.00k of 1.31B tokens of shards/c4"
    assert published_block(runs).absent == ()
    page = Parsed(build(runs, baseline=None)).text
    assert "Only the highlighted rows were measured here." in page
    assert re.search(r"sinkgd\s+measured here", page)


def test_a_run_of_another_model_stands_nowhere_and_the_page_says_why(tmp_path):
    nano = write_run(tmp_path, "adamw", {20: 4.0})
    other = write_run(tmp_path, "adamw", {20: 4.0}, parameters=33_700_000, **BENCHMARK)
    block = published_block([nano, other])
    assert block.measured == ()
    assert block.absent == (
        "llama-nano (1.00k parameters) is another model.",
        "llama-60m has 33.7M parameters, not the benchmark’s 58.1M.",
    )
    page = Parsed(build([nano])).text
    assert "None of this was measured here." in page
    assert "llama-nano (1.00k parameters) is another model" in page


def test_the_words_against_it_are_on_the_page(tmp_path):
    text = Parsed(build([write_run(tmp_path, "adamw", {20: 4.0})])).text
    assert "A tuned Adam removes the gain at 60M: 30.05" in text
    assert "find plain SinkGD behind AdamW" in text


def test_a_hostile_preset_stays_text(tmp_path):
    run = write_run(tmp_path, "adamw", {20: 4.0}, config={"model": {"preset": HOSTILE}})
    page = build([run])
    assert "alert(1)</script>" not in page
    assert HOSTILE in Parsed(page).text


def test_any_page_takes_the_blocks_with_one_call_each(tmp_path):
    template = tmp_path / "other.html"
    template.write_text(
        '{% extends "shell.html" %}'
        '{% from "published.html" import published_section %}'
        '{% from "calculator.html" import calculator_section %}'
        "{% block main %}{{ published_section(published) }}{{ calculator_section(calculator) }}"
        "{% endblock %}"
    )
    published = published_block([])
    page = render(
        template,
        title="T",
        charts=published.charts,
        filters={},
        published=published,
        calculator=calculator_block(),
    )
    ids = {tag.get("id") for _, tag in Parsed(page).tags}
    assert {"published-title", "published-llama-1b", "calculator"} <= ids
    assert "SinkGD takes 3.02 h instead of 9.24 h" in Parsed(page).text
