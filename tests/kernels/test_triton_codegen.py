"""Triton's kernels compiled for GPUs: no register spills, loads of 16 bytes, known shared memory.

This file is also the program that compiles them. Compiled kernels are not run; nothing is timed.

Those that steps usually take are compiled, some 35 a target; with ``SINKGD_EVERY_KERNEL=1`` in the
environment every one is, 140 a target, in about four minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compiled_for_gpus import build, facts, lines_of, options_for, target_of, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The launches of a call: which side is summed, what the first scales are found from, and whether
# sums follow.
HALVES = {
    "first rows": (True, 0, True),
    "first columns": (False, 1, True),
    "second rows": (True, 1, True),
    "columns": (False, 2, True),
    "rows": (True, 2, True),
    "finish of one": (True, 1, False),
    "finish": (True, 2, False),
}
TYPES = ("float32", "bfloat16", "float16")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SQUARE = (512, 512)
NARROW = [(1 << 20, 8), (1 << 20, 32), (32, 1 << 20), (8, 1 << 20)]
# Instructions that use local memory, at most.
SPILLS = {"columns float32 (1048576, 32) True False False": 8}  # triton 3.7 on sm_90; 3.9: none
# Bytes of shared memory of a float32 kernel in the square tile: a vector of scales, or the partial
# sums of as many rows of threads as a column of the tile is dealt to.
SHARED = {
    "cuda": {"first rows": 512, "second rows": 1024, "rows": 1024, "finish": 1024}
    | {"first columns": 4096, "columns": 4096, "finish of one": 1024, "update": 0},
    "hip": {"first rows": 512, "second rows": 1024, "rows": 1024, "finish": 1024}
    | {"first columns": 2048, "columns": 2048, "finish of one": 1024, "update": 0},
}


EVERY = os.environ.get("SINKGD_EVERY_KERNEL") == "1"


def half_variants():
    """Halves in the square tile by type and width of loads, and aligned ones in every tile."""
    if EVERY:
        yield from every_half_variant()
        return
    for half in HALVES:
        yield half, "float32", SQUARE, True, False, False
        yield half, "float32", SQUARE, False, False, False
        yield half, "bfloat16", SQUARE, True, False, False
    for half in ("rows", "columns"):
        for shape in NARROW[1:3]:
            yield half, "float32", shape, True, False, False


def every_half_variant():
    """Every half in every tile; both layouts, other types and a tolerance in the square tile."""
    for half in HALVES:
        for wide in (True, False):
            for shape in [SQUARE, *NARROW]:
                yield half, "float32", shape, wide, False, False
            yield half, "float32", SQUARE, wide, True, False
            yield half, "bfloat16", SQUARE, wide, False, False
        yield half, "float16", SQUARE, True, False, False
        yield half, "float32", SQUARE, True, False, True


def update_variants():
    """Updates of one type, to the nearest and at random, cautious or not, by width of loads."""
    if EVERY:
        yield from every_update_variant()
        return
    for wide in (True, False):
        for cautious in (False, True):
            for dtype in ("float32", "bfloat16"):
                yield dtype, dtype, SQUARE, wide, False, cautious
            yield "bfloat16", "bfloat16", SQUARE, wide, True, cautious
    yield "float32", "bfloat16", SQUARE, True, False, False
    yield "bfloat16", "float32", SQUARE, True, False, False


def every_update_variant():
    """Every mix of types in the square tile, every tile in bfloat16, both roundings."""
    for wide in (True, False):
        for dtype in TYPES:
            for grad_dtype in TYPES:
                for cautious in (False, True):
                    yield dtype, grad_dtype, SQUARE, wide, False, cautious
        for shape in [SQUARE, *NARROW]:
            for cautious in (False, True):
                yield "bfloat16", "bfloat16", shape, wide, True, cautious


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """What the compiler says of every kernel for one target."""
    return lines_of(__file__, "compile_all", request.param)


def test_every_kernel_is_compiled(compiled):
    kernels = [one["kernel"] for one in compiled]
    assert kernels.count("half_iteration") == len(list(half_variants()))
    assert kernels.count("update") == len(list(update_variants()))


def test_no_register_is_spilled(compiled):
    spilled = {one["name"]: one["spilled"] for one in compiled if one["spilled"]}
    assert {name: n for name, n in spilled.items() if n > SPILLS.get(name, 0)} == {}


def test_aligned_matrices_are_read_and_written_by_sixteen_bytes_alone(compiled):
    for one in compiled:
        assert (one["loads16"], one["stores16"]) == tuple(one["expected16"]), one["name"]


def test_shared_memory_is_what_the_sums_of_a_tile_need(compiled):
    for one in compiled:
        assert one["shared"] <= 8192, one["name"]
    square = {one["half"]: one["shared"] for one in compiled if one["plain"]}
    assert square == SHARED[compiled[0]["backend"]]


def test_a_step_compiles_six_kernels_and_one_and_a_later_step_none():
    first, *others = lines_of(__file__, "take_steps")
    assert first == {"half_iteration": 6, "update": 1}
    assert others == [first] * 4


# In the compiling process -------------------------------------------------------------------------


def take_steps():
    """Launch on a fake device, and write how many kernels were compiled so far."""
    import torch
    from triton.runtime import driver

    from sinkgd.kernels.triton import TritonBackend, half_iterations, launch

    device = type("Device", (), {})()
    device.get_current_device = device.get_current_stream = lambda *_: 0
    device.get_current_target = lambda: target_of("sm_90")
    driver.set_active(device)

    def start(kernel, programs, *arguments, **constants):
        options = half_iterations.options_of(launch.GpuTarget("cuda", 32), wide=True)
        kernel.warmup(*arguments, grid=(programs,), **constants, **options)

    launch.launch = start
    backend, kernels = (
        TritonBackend(whole_rows=False),
        (launch.kernels("square_sums").half_iteration, launch.kernels("update").update),
    )
    for count, num_iters, keep, step in [
        (1, 3, 0.9, -0.1),
        (1, 3, 1.0, 1.0),
        (3, 5, 0.9, 0.0),
        (16, 16, 0.5, 16.0),
        (2, 2, 1, 1),
    ]:
        grads = [torch.zeros(64, 128) for _ in range(count)]
        scales = backend.scales(grads, num_iters)
        backend.update_([grad.clone() for grad in grads], grads, scales, keep=keep, step=step)
        write({kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels})


def compile_all(name):
    from sinkgd.kernels.triton import primitives, square_sums, update

    target = target_of(name)
    for variant in half_variants():
        half, dtype, shape, wide, turned, tol = variant
        rows, origin, sums = HALVES[half]
        constants = {
            "DTYPE": primitives.DTYPES[torch_type(dtype)],
            "AXIS": int(rows != turned),
            "ROWS": rows,
            "FROM": origin,
            "SUMS": sums,
            "TOL": tol,
            **tile(shape, wide, 1),
            "VECTOR": 16 // BYTES[dtype] if wide else 1,
        }
        report(
            square_sums.half_iteration, constants, target, variant, first=half.startswith("first")
        )
    for variant in update_variants():
        dtype, grad_dtype, shape, wide, rounding, cautious = variant
        constants = {
            "DTYPE": primitives.DTYPES[torch_type(dtype)],
            "GRAD_DTYPE": primitives.DTYPES[torch_type(grad_dtype)],
            "KEEP_IS_STORED": False,
            "STEP_IS_STORED": rounding,
            "ROUND": rounding,
            "CAUTIOUS": cautious,
            **tile(shape, wide, 2),
            "VECTOR": 16 // min(BYTES[dtype], BYTES[grad_dtype]) if wide else 1,
            # Those with products are in test_skinny_codegen.py.
            "K": 0,
            "DENSE": False,
            "TF32": False,
        }
        report(update.update, constants, target, variant, first=False)


def torch_type(name):
    import torch

    return getattr(torch, name)


def tile(shape, wide, parts):
    from sinkgd.kernels.triton.half_iterations import AREA, tile_of

    return tile_of(*shape, AREA // parts // (1 if wide else 2))._asdict()


POINTERS = {
    **dict.fromkeys(["addresses", "starts", "matrices", "programs"], "*i64"),
    **dict.fromkeys(["old", "new", "out", "partial_sums"], "*fp32"),
    **dict.fromkeys(["nonzero", "earlier", "now", "coming"], "*i32"),
}
NUMBERS = {"done": "i32", "low": "fp32", "high": "fp32", "keep": "fp32", "step": "fp32"}


def report(kernel, constants, target, variant, *, first):
    """Compile one kernel and write a line on it."""
    from sinkgd.kernels.triton.half_iterations import options_of

    types = {**POINTERS, **NUMBERS}
    if constants.get("STEP_IS_STORED"):
        types["step"] = "*fp64"
    wide = constants["VECTOR"] > 1
    options = options_for(options_of, target, wide=wide, first=first)
    built = build(kernel, types, constants, target, options)
    half = variant[0] if kernel.__name__ == "half_iteration" else "update"
    write(
        {
            "kernel": kernel.__name__,
            "half": half,
            "name": " ".join(map(str, variant)),
            "plain": variant in PLAIN,
            "backend": target.backend,
            "expected16": sixteens(constants, wide and "finish" not in half),
            "shared": built.metadata.shared,
            **(cuda_facts(built, target) if target.backend == "cuda" else facts(built)),
        }
    )


# The kernels whose shared memory is listed above.
PLAIN = [(half, "float32", SQUARE, True, False, False) for half in HALVES]
PLAIN += [("float32", "float32", SQUARE, True, False, False)]


def sixteens(constants, wide):
    """How many loads and stores of 16 bytes a thread needs for its part of a tile."""
    from sinkgd.kernels.triton.half_iterations import THREADS

    entries = constants["BM"] * constants["BN"] // THREADS if wide else 0
    size, grad_size = (
        constants[name].primitive_bitwidth // 8 if name in constants else 0
        for name in ("DTYPE", "GRAD_DTYPE")
    )
    return entries * (size + grad_size) // 16, entries * size // 16 if grad_size else 0


def cuda_facts(built, target):
    """What ptxas says of the PTX; spills are bytes."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        arch = sm_arch_from_capability(target.arch)
        command = [get_ptxas(target.arch).path, "-v", f"-arch={arch}", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(stores) + int(loads),
        "loads16": built.asm["ptx"].count("ld.global.v4.b32"),
        "stores16": built.asm["ptx"].count("st.global.v4.b32"),
    }


if __name__ == "__main__":
    {"compile_all": compile_all, "take_steps": take_steps}[sys.argv[1]](*sys.argv[2:])
