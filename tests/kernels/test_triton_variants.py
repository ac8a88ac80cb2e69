"""Every kernel that steps of models launch, compiled for GPUs: spills, loads, instructions.

Kernels are compiled in a process of their own and not run; nothing is timed. With ``OTHER_TRITON``
in the environment, a folder with another version of triton, a sample is compiled under it, too:
``pip install --no-deps --target FOLDER triton==3.2.0``.
"""

import ast
import os
import sys
from pathlib import Path

import pytest

from sinkgd.kernels import triton
from sinkgd.lab.bench.gpu.cases import LLAMAS, MODELS, STEPS, TARGETS, USUAL
from sinkgd.lab.bench.gpu.variants import compiled, instructions_per_entry

KERNELS = sorted(Path(triton.__file__).parent.glob("*.py"))
# Bytes of shared memory of a block at most: on consumers' GPUs of compute capability 8, and on
# those of 10.0, where triton 3.7 keeps three parts of a float32 factor in it: 117 KiB, not 57.
SHARED = {"gfx942": 64 << 10, "sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 227 << 10}
# Instructions that use local memory, at most, by make of GPU, kernel, columns of its panel, and
# U_FROM: a thread of a first launch holds three numbers for each entry of its panel. On AMD it is
# registers, and bytes of scratch memory.
SPILLS = {
    ("sm", "full_iteration", 16384, "1"): 84,  # 14,336 columns, of Mixtral
    ("gf", "full_iteration", 16384, "2"): 8,  # triton 3.9: 4
    ("sm", "full_iteration", 6144, "0"): 104,  # 5,461 columns of a transposed matrix
    ("sm", "matmul", 64, None): 7,  # 5,461 columns, on sm_80; triton 3.9: 2, on sm_100
    ("gf", "full_iteration", 2048, "2"): 18,  # one of the rarer steps
    ("gf", "cautious finish", 6144, "0"): 8,  # it compares two signs for each entry of the panel
}
# Entries of llama-1b in bfloat16 and five iterations on sm_90, by the columns of the matrix.
MOST_INSTRUCTIONS = {2048: 80, 5461: 110}
# What launchers of triton call things of their own, beside a kernel's arguments.
RESERVED = {"params", "specialization", "options", "backend", "specialize_impl", "grid", "warmup"}


@pytest.fixture(scope="module", params=TARGETS)
def variants(request):
    """What steps of all models launch, for one target."""
    pytest.importorskip("triton")
    return compiled(request.param, MODELS, USUAL)


@pytest.fixture(scope="module", params=TARGETS)
def others(request):
    """What rarer steps of llama-1b launch, for one target."""
    pytest.importorskip("triton")
    return compiled(request.param, ["llama-1b"], [step for step in STEPS if step not in USUAL])


def spills_beyond_those_known(variants):
    return {one.name: one.spilled for one in variants if one.spilled > SPILLS.get(kind(one), 0)}


def kind(variant):
    is_cautious = constant(variant, "CAUTIOUS") == "True"
    kernel = f"cautious {variant.kernel}" if is_cautious else variant.kernel
    return variant.target[:2], kernel, variant.columns, constant(variant, "U_FROM")


def constant(variant, name):
    return dict(word.split("=", 1) for word in variant.constants.split() if "=" in word).get(name)


def narrow(variants):
    """Variants of aligned matrices that are not loaded by sixteen bytes.

    The last launch of half iterations adds nothing up (SUMS=False), and reads no gradient.
    """
    reading = [one for one in variants if constant(one, "SUMS") != "False"]
    return [one.name for one in reading if not one.is_wide and constant(one, "VECTOR") != "1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestOfModels:
    def test_no_register_is_spilled(self, variants):
        assert spills_beyond_those_known(variants) == {}

    def test_aligned_matrices_are_read_by_sixteen_bytes(self, variants):
        assert narrow(variants) == []

    def test_shared_memory_is_there(self, variants):
        assert max(one.shared for one in variants) <= SHARED[variants[0].target]

    @pytest.mark.parametrize("columns", MOST_INSTRUCTIONS)
    def test_instructions_an_entry_and_step(self, variants, columns):
        if variants[0].target != "sm_90":
            pytest.skip("the disassembly is counted for sm_90")
        found = instructions_per_entry(variants, "plain", "llama-1b", (2048, columns))
        assert 10 < found <= MOST_INSTRUCTIONS[columns]

    def test_every_model_and_step_is_there(self, variants):
        uses = {tuple(use.split()[:2]) for one in variants for use in one.uses}
        assert uses == {(step, model) for step in USUAL for model in MODELS}


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestOfRarerSteps:
    def test_no_register_is_spilled(self, others):
        assert spills_beyond_those_known(others) == {}

    def test_aligned_matrices_are_read_by_sixteen_bytes(self, others):
        assert narrow(others) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])  # triton 3.2 knows no sm_100
def test_a_sample_compiles_under_another_triton(target, monkeypatch):
    folder = os.environ.get("OTHER_TRITON")
    if folder is None:
        pytest.skip("OTHER_TRITON names no folder with another version of triton")
    paths = [folder, *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert compiled(target, LLAMAS[:2], ["plain", "deflated"])


def test_arguments_of_kernels_have_names_that_triton_leaves_to_them():
    for path in KERNELS:
        for kernel in compiled_functions(path):
            names = {argument.arg for argument in kernel.args.args}
            assert not RESERVED & names, f"{path.name}: {kernel.name}"


def test_kernels_have_no_expressions_that_triton_3_2_refuses():
    for path in KERNELS:
        for kernel in compiled_functions(path):
            for node in ast.walk(kernel):
                if isinstance(node, ast.BoolOp):
                    place = f"{path.name}:{node.lineno}"
                    assert len(node.values) == 2, f"{place}: a chain of and, or"
                    first = ast.unparse(node.values[0])
                    assert not first.startswith("tl."), f"{place}: {first} is no constexpr"


def compiled_functions(path):
    """What triton compiles of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(named, node.decorator_list):
            yield node


def named(decorator):
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def test_files_of_kernels_are_read():
    assert sum(1 for path in KERNELS for _ in compiled_functions(path)) > 20
