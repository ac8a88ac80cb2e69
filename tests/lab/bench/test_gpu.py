"""`sinkgd bench gpu`: figures that are counted without a GPU, each within a bound."""

import json

import pytest
import torch

from sinkgd.kernels.triton.schedule import row_programs
from sinkgd.lab.bench.gpu import cases, run
from sinkgd.lab.bench.gpu.cases import LLAMAS, MODELS, RANK, matrices_of
from sinkgd.lab.bench.gpu.interpreted import (
    Interpreted,
    interpreted,
    readings,
    readings_of_step,
)
from sinkgd.lab.bench.gpu.recorded import launches_of_bucket
from sinkgd.lab.bench.gpu.run import LIMITS, code_figures, missed
from sinkgd.lab.bench.gpu.scheduled_bytes import (
    bytes_of_step,
    matrices_in,
    schedule_of_model,
    scratch_of_model,
)
from sinkgd.lab.bench.gpu.variants import Variant, instructions_per_entry
from sinkgd.lab.cli import main

SMALL = ((24, 40), (40, 24), (17, 85))


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


class TestReadings:
    def test_a_plain_step(self, interpreter):
        found = readings_of_step(0, SMALL)
        assert found.per_entry == 6
        assert found.copies == 0

    def test_a_deflated_step(self, interpreter):
        found = readings_of_step(RANK, SMALL)
        assert found.per_entry <= 10
        assert found.copies == 0

    def test_torch_is_counted_too(self):
        pytest.importorskip("triton")
        grad = torch.ones(4, 6, dtype=torch.bfloat16)
        with readings([grad]) as found:
            copy = grad.float()
            copy.mul_(2).view(-1).sum()
            torch.empty_like(grad)
        assert (found.by_kernels, found.by_torch, found.copied) == (0, 3 * 24, 24)
        assert found.per_entry == 3


class TestSchedule:
    @pytest.mark.parametrize(
        ("model", "most"),
        [
            ("llama-60m", 0.43),
            ("llama-1b", 0.43),
            ("llama-7b", 0.82),
            ("mixtral-8x7b", 1.01),
            ("moe-64-experts", 0.57),
        ],
    )
    def test_bytes_of_a_step_as_a_multiple_of_adamw(self, model, most):
        assert 3 / 7 <= bytes_of_step(model) <= most

    @pytest.mark.parametrize(
        ("model", "of_bucket", "of_model"),
        [
            ("llama-60m", 0.085, 0.048),
            ("llama-1b", 0.128, 0.0031),
            ("llama-7b", 0.127, 0.0018),
            ("mixtral-8x7b", 0.13, 0.001),
            ("moe-64-experts", 0.129, 0.003),
        ],
    )
    def test_scratch(self, model, of_bucket, of_model):
        found = scratch_of_model(model)
        assert 0.05 < found.of_bucket <= of_bucket
        assert 0 < found.of_model <= of_model

    def test_every_matrix_is_in_one_bucket(self):
        found = schedule_of_model("moe-64-experts")
        matrices = [x for bucket in found.buckets for x in matrices_in(bucket, found)]
        shapes = matrices_of("moe-64-experts")
        experts = sum(shape[0] if len(shape) > 2 else 1 for shape in shapes)
        assert len(matrices) == experts
        panels = {bucket.kind.panel for bucket in found.buckets}
        assert {matrix.programs for matrix in matrices} <= {
            len(row_programs(0, matrix.P, panel)) for matrix in matrices for panel in panels
        }

    def test_launches_of_a_bucket(self):
        assert launches_of_bucket() == 6


A_VARIANT = {
    "target": "sm_90",
    "kernel": "full_iteration",
    "constants": "A=2048 B=0 U_FROM=1",
    "uses": ("plain llama-1b 2048×2048",) * 5,
    "threads": 256,
    "entries": 64.0,
    "columns": 2048,
    "bytes": 2,
    "shared": 0,
    "registers": 100,
    "spilled": 0,
    "loads2": 0,
    "loads16": 8,
    "stores16": 0,
    "loops": (640, 50),
}


class TestCode:
    def test_instructions_are_those_of_the_loop_by_the_entries_of_the_matrix(self):
        one = Variant(**A_VARIANT)
        assert instructions_per_entry([one], "plain", "llama-1b", (2048, 2048)) == 50
        padded = Variant(**{**A_VARIANT, "uses": ("plain llama-1b 9×1024",)})
        assert instructions_per_entry([padded], "plain", "llama-1b", (9, 1024)) == 20

    def test_spills_and_narrow_loads_are_named(self):
        bad = Variant(**{**A_VARIANT, "spilled": 3, "loads16": 7})
        assert not Variant(**{**A_VARIANT, "loads2": 64}).is_wide
        variants = [Variant(**A_VARIANT), bad]
        (found,) = missed(variants)
        assert found.why == "3 spills, loads below 16 bytes"
        values = {figure.name: figure.value for figure in code_figures(variants, ["sm_90"])}
        assert values["variants that spill, sm_90"] == 1
        assert values["variants with loads below 16 bytes, sm_90"] == 1


def test_matrices_of_a_mixture_are_those_of_the_model():
    entries = sum(torch.Size(shape).numel() for shape in matrices_of("mixtral-8x7b"))
    assert entries == pytest.approx(46.4e9, rel=0.01)
    assert set(LLAMAS) < set(MODELS)


class TestCommand:
    @pytest.fixture
    def found(self, monkeypatch):
        found = Interpreted(6.0, 9.0, 0.0, 4e-7, 4e-6)
        monkeypatch.setattr(run, "interpreted", lambda: found)
        # It needs kernels that are not interpreted.
        monkeypatch.setattr(run, "host_time_figures", list)
        return found

    def test_it_prints_the_table_and_writes_it(self, found, capsys, tmp_path):
        parts = "interpreter,host,schedule"
        assert main(["bench", "gpu", "--parts", parts, "--out", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        record = json.loads((tmp_path / "gpu.json").read_text())
        figures = {figure["name"]: figure for figure in record["figures"]}
        assert {*LIMITS} - {*figures} == {name for name in LIMITS if name.startswith("SASS")}
        assert figures["readings of G per entry and step, deflated"]["value"] == 9
        rows = [line.split() for line in shown.splitlines()]
        assert ["6", "≤", "6", "yes"] in [row[-4:] for row in rows]
        assert ["4.0e-06", "≤", "3.0e-06", "no"] in [row[-4:] for row in rows]
        assert "Nothing here is a time on a GPU" in shown

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--parts", "hosts"], "parts is 'hosts'; did you mean 'host'?"),
            (["--gpus", "sm90"], "gpus is 'sm90'; did you mean 'sm_90'?"),
            (["--models", "llama-1c"], "models is 'llama-1c'; did you mean 'llama-1b'?"),
        ],
    )
    def test_errors_name_the_option(self, capsys, arguments, message):
        assert main(["bench", "gpu", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")

    def test_a_failure_of_a_process_is_told(self, monkeypatch):
        monkeypatch.setattr(cases.sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="triton's interpreter failed"):
            interpreted()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_command(capsys):
    assert main(["bench", "gpu", "--gpus", "sm_90", "--models", "llama-1b"]) == 0
    shown = capsys.readouterr().out
    assert all(name.split(",")[0] in shown.replace("\n", " ") for name in LIMITS)
