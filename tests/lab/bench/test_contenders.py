"""Every contender updates as its method says, and who cannot run says why."""

import pytest
import torch
from torch.testing import assert_close

from option_reference import Expected
from reference import square_root_sinkhorn
from sinkgd.lab.bench import contenders as table
from sinkgd.lab.bench.contenders import ADAMW, LR, contenders, our_name
from sinkgd.lab.bench.workloads import Problem, Workload, build_problem
from sinkgd.lab.models import PRESETS, Llama
from sinkgd.optim.param_groups import DEFLATED_RANK

CPU = torch.device("cpu")
TINY = Workload("tiny", "tiny", lambda: ((6, 4), (5, 7)))
NAMES = [contender.name for contender in contenders(TINY, CPU)]
ITERATIONS = {"naive-loop": 5, "compiled-loop": 5} | {
    our_name(backend, iterations): iterations
    for backend, reason in table.backends(CPU)
    if reason is None
    for iterations in table.ITERATIONS
}
TOLERANCES = {"float32": 1e-6, "bfloat16": 0.02}


def contender(name):
    return next(one for one in contenders(TINY, CPU) if one.name == name)


def step(name, dtype):
    """Return what one step subtracts from parameters that are zero, in units of the rate."""
    problem = build_problem(TINY, dtype, CPU)
    for param in problem.params:
        param.data.zero_()
    contender(name).build(problem).step()
    return [-param.detach().double() / LR for param in problem.params], problem.grads


def check_against_the_oracle(name, dtype):
    moved, grads = step(name, dtype)
    for found, grad in zip(moved, grads, strict=True):
        exact = square_root_sinkhorn(grad, ITERATIONS[name])
        assert_close(found, exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", [name for name in ITERATIONS if name != "compiled-loop"])
def test_every_form_of_sinkgd_makes_the_oracles_step(name, dtype):
    check_against_the_oracle(name, dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_compiled_form_makes_the_oracles_step(dtype):
    if (reason := table.compiler_missing()) is not None:
        pytest.skip(reason)
    check_against_the_oracle("compiled-loop", dtype)


@pytest.mark.parametrize("name", ["adamw-foreach", ADAMW])
def test_the_first_step_of_adamw_is_the_sign(name):
    moved, grads = step(name, "float32")
    for found, grad in zip(moved, grads, strict=True):
        assert_close(found, grad.sign().double(), rtol=1e-2, atol=0)


def test_sgd_moves_by_the_gradient():
    moved, grads = step("sgd-fused", "float32")
    for found, grad in zip(moved, grads, strict=True):
        assert_close(found, grad.double(), rtol=1e-6, atol=0)


def test_muon_steps_are_as_large_as_adamws():
    moved, _ = step("muon", "float32")
    for found in moved:
        assert 0.1 < found.square().mean().sqrt() < 0.4  # 0.2, and Newton–Schulz is not exact


def test_the_deflated_step_is_the_oracles():
    moved, grads = step("deflated", "float32")
    for found, grad in zip(moved, grads, strict=True):
        expected = Expected(torch.zeros_like(grad), deflated_rank=DEFLATED_RANK).step(grad)
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_swan_makes_singular_values_nearly_equal():
    moved, _ = step("swan", "float32")
    for found in moved:
        sizes = torch.linalg.svdvals(found)
        assert sizes.max() < 1.6 * sizes.min()
        assert_close(found.square().mean(), torch.tensor(1.0).double(), rtol=1e-3, atol=0)


def test_adamw_comes_first_and_every_backend_has_its_rows():
    assert NAMES[0] == ADAMW
    assert len(NAMES) == len(set(NAMES)) == 8 + 2 * len(table.backends(CPU))


def test_a_backend_that_does_not_run_says_why(monkeypatch):
    rows = [("fast", False, "no such chip"), ("eager", True, "")]
    monkeypatch.setattr(table.kernels, "describe", lambda device: rows)
    assert contender("sinkgd-fast").absent() == "no such chip"
    assert contender("sinkgd-eager-L1").absent() is None


def test_a_compiler_that_fails_is_quoted(monkeypatch):
    def fail(num_iters):
        raise RuntimeError("backend raised:\nInvalidCxxCompiler: No working C++ compiler found\n")

    monkeypatch.setattr(table, "compiled_update", fail)
    table.compiler_missing.cache_clear()
    reason = table.compiler_missing()
    table.compiler_missing.cache_clear()
    assert "InvalidCxxCompiler: No working C++ compiler found" in reason


def test_floors_count_passes_over_the_matrices():
    problem = build_problem(TINY, "bfloat16", CPU)
    size = 2 * (24 + 35)
    floors = {n: contender(n).floor_bytes(problem) // size for n in (ADAMW, "sgd-fused")}
    assert floors == {ADAMW: 7, "sgd-fused": 3}
    assert contender("sinkgd-eager").floor_bytes(problem) == 8 * size
    assert contender("sinkgd-eager-L1").floor_bytes(problem) == 4 * size
    assert contender("muon").floor_bytes is None


def test_the_hybrids_floor_has_two_parts():
    with torch.device("meta"):
        model = Llama(PRESETS["llama-9m"])
    whole = Workload("whole", "whole", tuple, model="llama-9m")
    hybrid = next(one for one in contenders(whole, CPU) if one.name == "hybrid-eager")
    matrices = 4 * PRESETS["llama-9m"].linear_parameter_count
    rest = 4 * PRESETS["llama-9m"].parameter_count - matrices
    problem = Problem(list(model.parameters()), model)
    assert hybrid.floor_bytes(problem) == 8 * matrices + 7 * rest
