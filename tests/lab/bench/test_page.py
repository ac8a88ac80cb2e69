"""The pages carry the figures, the targets and the command, and trust no string of a record."""

import pytest

from lab.bench.synthetic import kernels_record, memory_record, step_record, workload
from lab.report.test_page import HOSTILE, Parsed
from sinkgd.lab.bench.bench_kernels import kernels_page
from sinkgd.lab.bench.memory_report import memory_page
from sinkgd.lab.bench.step_record import evaluate
from sinkgd.lab.bench.step_report import check_table, step_page, target_table, workload_table
from sinkgd.lab.report.console import terminal_table


@pytest.fixture
def record():
    record = step_record(workload(), workload("llama-60m", "bfloat16"))
    return step_record(*record.workloads, targets=evaluate(record))


def test_the_step_page_has_the_headline_the_targets_and_who_is_absent(record):
    page = Parsed(step_page(record))
    assert "a step of SinkGD takes 1.10 times as long as fused AdamW’s, in float32" in page.text
    assert "llama-1b-layer, float32, L=5, × its floor" in page.text
    assert "not measured: no compiler <b>" in page.text
    assert "AdamW needs 18 GiB" in page.text
    assert "sinkgd bench step" in page.text
    charts = {tag["id"] for _, tag in page.tags if tag.get("class") == "chart"}
    assert charts == {"ratio-float32", "ratio-bfloat16"}


def test_the_other_pages_have_a_chart_for_each_type_and_a_table_for_each_case():
    page = Parsed(memory_page(memory_record()))
    assert "no compiler" in page.text
    assert "memory-llama-60m-float32" in {tag.get("id") for _, tag in page.tags}
    page = Parsed(kernels_page(kernels_record()))
    assert "does not run on cpu" in page.text
    ids = {tag.get("id") for _, tag in page.tags}
    assert {"squares-float32", "shapes-float32", "squares-bfloat16", "shapes-bfloat16"} <= ids


def test_a_page_with_nothing_measured_is_still_a_page():
    record = step_record()
    page = Parsed(step_page(step_record(targets=evaluate(record))))
    assert "Optimizer steps against fused AdamW." in page.text


def test_no_string_of_a_record_is_run():
    hostile = workload(name=HOSTILE, reason=HOSTILE)
    page = Parsed(step_page(step_record(hostile, command=HOSTILE, environment={HOSTILE: HOSTILE})))
    assert len(page.scripts) == 3
    assert page.text.count(HOSTILE) >= 5


def test_the_terminal_has_the_same_figures(record, capsys):
    from rich.console import Console

    console = Console(width=200)
    for sheet in (
        target_table(record),
        check_table(record),
        *map(workload_table, record.workloads),
    ):
        console.print(terminal_table(sheet))
    shown = capsys.readouterr().out
    assert "public, compiled: no compiler <b>" in shown
    assert "≤ 1.15" in shown.replace("\N{NO-BREAK SPACE}", " ")
    assert "slowest of 2 processes with a warm cache; 11.00 s with an empty cache" in shown
