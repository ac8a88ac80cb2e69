"""The cost of a run against figures computed by hand, and what the calculator begins with."""

import math

import pytest

from lab.report.synthetic_runs import write_run
from lab.report.test_page import HOSTILE, Parsed, build
from sinkgd.lab.devices import DEVICES
from sinkgd.lab.report import analyze, calculator_block
from sinkgd.lab.report.calculator import PRICES, amount, plain, short, signed
from sinkgd.lab.report.cost import (
    STATE_RULES,
    Change,
    Machine,
    assumed_speed,
    changed_cost,
    devices_needed,
    gpu_hours,
    run_cost,
)
from sinkgd.lab.report.figures import identify
from sinkgd.lab.report.line_charts import loss_chart

AXES = ("tokens", "seconds")
MACHINE = Machine(gpus=8, price=2.5, watts=700.0)
H100 = {"environment": {"device": "NVIDIA H100 80GB HBM3"}}


def test_a_run_costs_what_one_computes_by_hand():
    # 13,107,200,000 tokens at 50,000 a second are 262,144 seconds: 72.8178 hours of a GPU.
    cost = run_cost(MACHINE, 13_107_200_000, 50_000)
    assert cost.gpu_hours == pytest.approx(72.817777778)
    assert cost.hours == pytest.approx(9.102222222)
    assert cost.usd == pytest.approx(182.044444444)
    assert cost.kwh == pytest.approx(50.972444444)


def test_a_candidate_takes_its_part_of_the_tokens_at_its_own_speed():
    # 40 % of the tokens at 1.25 times the speed: 32 % of everything.
    cost = changed_cost(MACHINE, 13_107_200_000, 50_000, Change(0.40, 1.25))
    assert cost.hours == pytest.approx(0.32 * 9.102222222)
    assert cost.usd == pytest.approx(58.254222222)


def test_the_papers_effective_throughput_is_steps_and_speed_together():
    # 58.0k tokens a second raw, and 161.8k effective against Adam: 2.79 = the 2.8× of steps.
    cost = changed_cost(MACHINE, 13.1e9, 53_000, Change(1 / 2.8, 58.0 / 53.0))
    assert 13.1e9 / (3600 * cost.gpu_hours) == pytest.approx(161_800, rel=0.005)


def test_the_assumed_speed_is_six_operations_a_weight_and_token():
    assert assumed_speed(989.4e12, 0.40, 1_339_080_000) == pytest.approx(49_257, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_what_cannot_be_is_refused_by_name(value):
    with pytest.raises(ValueError, match="speed is"):
        gpu_hours(1.0, value)
    with pytest.raises(ValueError, match="tokens is"):
        run_cost(MACHINE, value, 1.0)
    with pytest.raises(ValueError, match="mfu is"):
        assumed_speed(1.0, value, 1.0)
    with pytest.raises(ValueError, match="token_fraction is"):
        Change(value, 1.0)
    if value != 0:
        with pytest.raises(ValueError, match="price is"):
            Machine(1, value, 1.0)
    with pytest.raises(ValueError, match="gpus is 0; give at least 1"):
        Machine(0, 1.0, 1.0)


def test_without_runs_everything_is_published_or_assumed():
    block = calculator_block()
    assert {one.tokens_kind for one in block.candidates} == {"published", "assumed"}
    assert {one.kind for one in block.speeds} == {"published", "assumed"}
    assert [one.key for one in block.models][:2] == ["llama-9m", "llama-20m"]
    assert block.inputs.candidate.token_fraction == pytest.approx(1 / 2.8)
    assert block.inputs.model.tokens == 13_107_200_000
    assert {device.name for device in block.devices} == set(DEVICES)
    time, _, money, energy = block.outcomes
    # 13.1072e9 / (3600 × 49,260 × 8), and 35.71 % of it at 1.094 times the speed
    assert time.baseline == pytest.approx(9.2390, rel=1e-4)
    assert time.candidate == pytest.approx(9.2390 * 0.3571 / 1.094, rel=1e-4)
    assert money.baseline == pytest.approx(9.2390 * 8 * 2, rel=1e-4)
    assert energy.baseline == pytest.approx(9.2390 * 8 * 0.7, rel=1e-4)


def test_the_fastest_that_reached_the_baseline_is_the_candidate(tmp_path):
    losses = {10: 5.0, 20: 4.0}
    runs = [
        write_run(tmp_path, "adamw", losses, **timed(1.0), **H100),
        write_run(tmp_path, "few-tokens", {10: 4.0, 20: 3.0}, **timed(4.0), **H100),
        write_run(tmp_path, "fast", {15: 4.0, 20: 3.5}, **timed(0.5), **H100),
        write_run(tmp_path, "never", {20: 4.5}, **timed(1.0)),
    ]
    block = calculator_block(analyze(runs, "adamw"))
    measured = [one for one in block.candidates if one.tokens_kind == "measured"]
    assert [one.name for one in measured] == ["fast", "few-tokens"]
    assert block.inputs.candidate is measured[0]
    assert measured[0].token_fraction == pytest.approx(0.75)
    assert measured[0].step_speedup == pytest.approx(2.0)
    assert (block.baseline, block.caution) == ("adamw", "")
    assert block.inputs.speed.kind == "measured"


def timed(step_seconds):
    """Return the seconds of steps that differ in the optimizer alone."""
    return {"step_seconds": step_seconds, "optimizer_seconds": step_seconds - 0.2}


def test_times_that_cannot_be_compared_give_no_speed_and_no_arrows(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}, **H100),
        write_run(tmp_path, "sinkgd", {10: 4.0, 20: 3.0}, step_seconds=4.0, **H100),
    ]
    analysis = analyze(runs, "adamw")
    candidate = calculator_block(analysis).inputs.candidate
    assert (candidate.step_speedup, candidate.speed_kind) == (1.0, "assumed")
    charts = {along: loss_chart(analysis, identify(analysis), along) for along in AXES}
    arrows = {
        along: [one for one in chart.figure["layout"]["annotations"] if "arrowhead" in one]
        for along, chart in charts.items()
    }
    assert [len(arrows[along]) for along in AXES] == [1, 0]
    assert "Do not compare these times" in charts["seconds"].caption
    assert "Do not compare" not in charts["tokens"].caption


def test_where_nobody_reached_the_baseline_the_page_says_so(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: 4.0}), write_run(tmp_path, "sgd", {20: 4.5})]
    block = calculator_block(analyze(runs, "adamw"))
    assert "because none reached the baseline’s loss at a measured speed" in block.caution
    assert block.inputs.candidate.tokens_kind == "published"


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_of_the_table_brings_its_measured_speed(tmp_path, name, device):
    run = write_run(tmp_path, "adamw", {20: 4.0}, environment={"device": name})
    inputs = calculator_block(analyze([run], "adamw")).inputs
    assert inputs.device.name == device
    assert (inputs.speed.kind, inputs.speed.value) == ("measured", 100.0)
    assert (inputs.model.key, inputs.model.tokens) == ("page", 2000.0)


@pytest.mark.parametrize(
    "name", ["cpu", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "A100-SXM4-40GB"]
)
def test_a_device_that_is_not_in_the_table_is_not_taken_for_one(tmp_path, name):
    run = write_run(tmp_path, "adamw", {20: 4.0}, environment={"device": name})
    assert calculator_block(analyze([run], "adamw")).inputs.speed.kind == "assumed"


def test_a_speed_is_of_one_of_the_ranks(tmp_path):
    # The configuration leaves dp_shard open; the run records what it became.
    asked = {"mesh": {"dp_replicate": 2, "tp": 1}, "model": {"preset": "llama-60m"}}
    found = {**H100["environment"], "mesh": {"dp_replicate": 2, "dp_shard": 2, "tp": 1}}
    run = write_run(tmp_path, "adamw", {20: 4.0}, config=asked, environment=found)
    assert calculator_block(analyze([run], "adamw")).inputs.speed.value == 25.0


def test_numbers_are_written_with_three_digits():
    written = [amount(value) for value in (0.05, 6.8951, 9.2, 1234.5, 1_225_000, 0.000051)]
    assert written == ["0.05", "6.9", "9.2", "1,230", "1,230,000", "0.0001"]
    assert [signed(1.0), signed(-1500.0), signed(0.0)] == ["+1", "−1,500", "0"]
    assert [plain(58.0736), short(0.97974)] == ["58.0736", "0.9797"]


def test_the_page_has_the_calculator_with_a_badge_for_every_field(tmp_path):
    page = Parsed(build([write_run(tmp_path, "adamw", {20: 4.0})]))
    inputs = [tag["name"] for name, tag in page.tags if name == "input"]
    badges = [tag["data-for"] for _, tag in page.tags if "data-for" in tag]
    assert inputs == badges
    assert len(inputs) == 10
    kinds = {tag["data-kind"] for _, tag in page.tags if "data-for" in tag}
    assert kinds <= {"measured", "published", "assumed"}
    labels = {tag["for"] for name, tag in page.tags if name == "label"}
    assert labels == {tag["id"] for name, tag in page.tags if name in ("input", "select")}


def test_the_blocks_are_small_and_hostile_names_stay_text(tmp_path):
    runs = [write_run(tmp_path, "adamw", {20: 4.0}), write_run(tmp_path, HOSTILE, {20: 3.0})]
    raw = build(runs)
    assert "alert(1)</script>" not in raw
    page = Parsed(raw)
    assert HOSTILE in [tag.get("data-name") for _, tag in page.tags]
    begin = raw.index('<section class="published"')
    assert raw.index('<section class="details"') - begin < 40_000  # bytes of both blocks
    assert len(raw) - len(page.scripts[1]) < 160_000  # beside plotly


def test_no_speed_of_a_cpu_enters_the_price_of_a_gpu(tmp_path):
    runs = [
        write_run(tmp_path, "adamw", {10: 5.0, 20: 4.0}),
        write_run(tmp_path, "fast", {15: 4.0, 20: 3.5}, step_seconds=0.5),
    ]
    block = calculator_block(analyze(runs, "adamw"))
    assert {one.kind for one in block.speeds} == {"assumed", "published"}
    candidate = block.inputs.candidate
    assert (candidate.tokens_kind, candidate.speed_kind) == ("measured", "assumed")
    assert candidate.step_speedup == 1.0


def test_memory_by_method_is_what_one_computes_by_hand():
    # 1e9 parameters, 80 % of them in hidden matrices, bfloat16: 2 + 2 bytes and the state.
    held = {rule.method: rule.memory_bytes(1e9, 0.8) for rule in STATE_RULES}
    assert held == pytest.approx(
        {"AdamW": 8e9, "Muon": 6.4e9, "SinkGD": 4.8e9, "SinkGD, stateless": 4e9}
    )
    assert [devices_needed(value, 5e9) for value in held.values()] == [2, 2, 2, 1]


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_a_share_above_the_whole_is_refused(share):
    with pytest.raises(ValueError, match="matrix_share is"):
        STATE_RULES[0].memory_bytes(1e9, share)
    with pytest.raises(ValueError, match="mfu is"):
        assumed_speed(1e12, share if share != -0.1 else 1.5, 1e9)


def test_every_device_has_a_price():
    assert set(PRICES) == set(DEVICES)
