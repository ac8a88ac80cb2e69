"""Workloads have the shapes of the presets' modules, and gradients as real ones have."""

import pytest
import torch

import sinkgd
from sinkgd.lab.bench import workloads
from sinkgd.lab.bench.workloads import (
    WORKLOADS,
    Workload,
    available_bytes,
    build_problem,
    matrix_shapes,
)
from sinkgd.lab.models import PRESETS, Llama

CPU = torch.device("cpu")


@pytest.mark.parametrize("preset", ["llama-60m", "llama-130m", "llama-350m", "llama-1b"])
def test_matrices_are_those_that_param_groups_gives_to_sinkgd(preset):
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    groups = sinkgd.param_groups(model)
    matrices = [p for g in groups if g["algorithm"] == "sinkgd" for _, p in g["params"]]
    assert sorted(WORKLOADS[preset].shapes()) == sorted(tuple(p.shape) for p in matrices)


def test_a_layer_of_the_largest_model_has_four_square_and_three_long_matrices():
    shapes = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    assert list(WORKLOADS["llama-1b-layer"].shapes()) == shapes
    assert matrix_shapes("llama-1b") == tuple(shapes) * 24


def test_the_hybrid_has_every_parameter():
    sizes = [torch.Size(shape).numel() for shape in WORKLOADS["llama-60m-hybrid"].shapes()]
    assert sum(sizes) == PRESETS["llama-60m"].parameter_count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_gradients_are_of_the_type_and_the_same_each_time(dtype):
    workload = Workload("w", "w", lambda: ((6, 4), (2, 3, 5), (7,)))
    one, other = build_problem(workload, dtype, CPU), build_problem(workload, dtype, CPU)
    assert [tuple(p.shape) for p in one.params] == list(workload.shapes())
    assert {t.dtype for t in (*one.params, *one.grads)} == {getattr(torch, dtype)}
    assert all(map(torch.equal, one.grads, other.grads))
    assert all(grad.isfinite().all() and grad.count_nonzero() for grad in one.grads)
    assert one.bytes == (24 + 30 + 7) * one.params[0].element_size()


def test_free_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(workloads, "_MEMINFO", tmp_path / "absent")
    assert available_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2 kB\n", encoding="utf-8")
    monkeypatch.setattr(workloads, "_MEMINFO", tmp_path / "meminfo")
    assert available_bytes(CPU) == 2048
