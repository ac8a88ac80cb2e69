"""The kernels of whole rows compiled for GPUs: registers, width of loads, instructions an entry.

This file is also the program that compiles them, in a process of its own: triton's interpreter and
its compiler do not share one. Compiled kernels are not run here, and nothing is timed.

What a step of llama-60m, 1b and 7b launches in bfloat16 is compiled, and a few others; with
``SINKGD_EVERY_KERNEL=1`` in the environment also float32, all phases of turned matrices, a
tolerance, starts and stochastic rounding.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# name: (backend, architecture, threads a warp)
TARGETS = {
    "cuda80": ("cuda", 80, 32),
    "cuda90": ("cuda", 90, 32),
    "cuda100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# The matrices of one layer: those of a hidden size h and of an inner size.
MODELS = {"llama-60m": (512, 1376), "llama-1b": (2048, 5461), "llama-7b": (4096, 11008)}
EVERY = os.environ.get("SINKGD_EVERY_KERNEL") == "1"
ITERATIONS = 5
# Instructions that a thread issues in the loop over panels, an entry and step of llama-1b in
# bfloat16 for sm_90, by the columns of the matrix.
MOST_INSTRUCTIONS = {2048: 80, 5461: 110}
LDS = 64 << 10  # bytes of shared memory on gfx942, the smallest


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """What the compiler says of every kernel for one target."""
    return reports(request.param)


def reports(target):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, target],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_register_is_spilled(compiled):
    assert {one["name"]: one["spilled"] for one in compiled if one["spilled"]} == {}


def test_aligned_matrices_are_read_and_written_by_sixteen_bytes_alone(compiled):
    for one in compiled:
        if one["vector"] > 1:
            assert one["loads16"] >= one["entries"] * one["bytes"] / 16, one["name"]


def test_shared_memory_is_small(compiled):
    assert max(one["shared"] for one in compiled) <= LDS / 2


@pytest.mark.parametrize("Q", MOST_INSTRUCTIONS)
def test_instructions_an_entry_and_step(compiled, Q):
    if compiled[0]["target"] != "cuda90":
        pytest.skip("the disassembly is counted for sm_90")
    cost = {
        one["phase"]: one["loop"] / one["entries"]
        for one in compiled
        if one["Q"] == Q and one["plain"]
    }
    step = cost["first"] + (ITERATIONS - 1) * cost["later"] + cost["finish"]
    assert step <= MOST_INSTRUCTIONS[Q]


# In the compiling process -------------------------------------------------------------------------


def kinds():
    """Kinds of matrices, each with its shape, and whether it is among a plain step's."""
    import torch

    from sinkgd.kernels.layout import layout_of
    from sinkgd.kernels.triton.places import Source
    from sinkgd.kernels.triton.schedule import schedule_of

    def found(shape, dtype, param_dtype, *, is_turned):
        size = torch.Size(shape)
        stride = (1, shape[0]) if is_turned else (shape[1], 1)
        grad, param = (Source(one, layout_of(size, stride), True) for one in (dtype, param_dtype))
        return schedule_of((grad,), (param,), (size,), (0,), 1 << 30).buckets[0].kind

    seen = set()
    for h, inner in MODELS.values():
        for shape in [(h, h), (inner, h), (h, inner)]:
            kind = found(shape, torch.bfloat16, torch.bfloat16, is_turned=False)
            if kind not in seen:
                seen.add(kind)
                yield kind, shape[1], True
    h, inner = MODELS["llama-1b"]
    yield found((h, h), torch.bfloat16, torch.bfloat16, is_turned=True), h, False
    if EVERY:
        yield found((h, inner), torch.bfloat16, torch.bfloat16, is_turned=True), h, False
        for dtype in (torch.float32, torch.float16):
            for shape in [(h, h), (h, inner)]:
                yield found(shape, dtype, dtype, is_turned=False), shape[1], False
        yield found((h, h), torch.bfloat16, torch.float32, is_turned=False), h, False
        yield found((64, 64), torch.bfloat16, torch.bfloat16, is_turned=False), 64, False


def variants(device):
    """Every kernel with its constants: (phase, kernel, constants, kind, columns, plain)."""
    from sinkgd.kernels.triton import launch
    from sinkgd.kernels.triton.descent import Given, finish_constants, sweep_constants

    sweep, finish = launch.sweep().sweep, launch.finish().finish
    for kind, Q, plain in kinds():
        phases = ("first", "second", "later") if kind.turned else ("first", "later")
        for i, phase in enumerate(phases):
            constants = sweep_constants(kind, i, False, False, device)
            yield phase, sweep, constants, kind, Q, plain
            if EVERY and MODELS["llama-1b"][0] == Q:
                constants = sweep_constants(kind, i, True, True, device)
                yield phase, sweep, constants, kind, Q, False
        origins = (1, 2) if kind.turned else (0,)
        for origin in origins if EVERY else origins[-1:]:
            constants = finish_constants(kind, origin, Given(), device)
            yield "finish", finish, constants, kind, Q, plain
            if EVERY:
                given = Given(overflow=True, keep=True, step=True, rounding=True)
                constants = finish_constants(kind, origin, given, device)
                yield "finish", finish, constants, kind, Q, False
        if kind.turned:
            constants = finish_constants(kind, 2, None, device)
            yield "last scales", finish, constants, kind, Q, False


POINTERS = {
    **dict.fromkeys(["grads", "starts", "table", "weights", "keys"], "*i64"),
    **dict.fromkeys(["scales", "partial"], "*fp32"),
    **dict.fromkeys(["numbers", "overflow"], "*i32"),
}
INTEGERS = ("blocks", "walks", "count", "flip", "iteration", "last")
NUMBERS = {**dict.fromkeys(INTEGERS, "i32"), "low": "fp32", "high": "fp32"}


def compile_all(name):
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sinkgd.kernels.triton import descent

    target = GPUTarget(*TARGETS[name])
    descent.panel_options = lambda device, threads, wide, bare=False, lean=False: (
        descent.options_of(
            target.backend, target.warp_size, threads, wide=wide, bare=bare, lean=lean
        )
    )
    for phase, kernel, given, kind, Q, plain in variants(torch.device("cpu")):
        constants = {key: value for key, value in given.items() if key in kernel.arg_names}
        options = {key: value for key, value in given.items() if key not in constants}
        factor = {
            key: "*fp32" if constants.get(f"{key.upper()}_IS_STORED") else "fp32"
            for key in ("keep", "step")
        }
        types = {**POINTERS, **NUMBERS, **factor, **dict.fromkeys(constants, "constexpr")}
        signature = {key: types[key] for key in kernel.arg_names}
        pointers = [i for i, one in enumerate(signature.values()) if one.startswith("*")]
        source = ASTSource(
            kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers}
        )
        built = triton.compile(source, target=target, options=options)
        panel = constants["BM"] * (constants["A"] + constants["B"])
        threads = options["num_warps"] * target.warp_size
        facts = cuda_facts(built) if target.backend == "cuda" else hip_facts(built)
        line = {
            "target": name,
            "name": f"{phase} {kind} {constants}",
            "phase": phase,
            "plain": plain,
            "Q": Q,
            # A thread's part of a panel; its columns beyond the matrix are work, but no entries.
            "entries": panel / threads * Q / (constants["A"] + constants["B"]),
            "vector": constants["VECTOR"],
            "bytes": kind.dtype.itemsize,
            "shared": built.metadata.shared,
            **facts,
        }
        if loops := line.pop("loops", None):
            # The loop over panels comes first; shorter ones divide.
            line["loop"] = next(loop for loop in loops if loop > 3 * line["entries"])
        sys.stdout.write(json.dumps(line) + "\n")


def cuda_facts(built):
    """Registers, uses of local memory, and the lengths of loops, from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(tool), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+|\.L_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    for i, instruction in enumerate(instructions):
        branch = re.search(r"BRA\S*\s.*?`\((\.L_x_\d+|\.L_\d+)\)", instruction)
        if branch and labels.get(branch[1], i + 1) < i:
            loops.append(i + 1 - labels[branch[1]])
    words = re.findall(r"R(\d+)\b", text)
    return {
        "registers": max(map(int, words)) + 1,
        "spilled": sum("LDL" in one or "STL" in one for one in instructions),
        "loads16": sum("LDG.E.128" in one for one in instructions),
        "stores16": sum("STG.E.128" in one for one in instructions),
        "loops": loops,
    }


def hip_facts(built):
    """What the code object's metadata say; spills are registers, and bytes of scratch memory."""
    code = built.asm["amdgcn"]
    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]),
        "spilled": sum(int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in spills),
        "loads16": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "stores16": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
    }


if __name__ == "__main__":
    compile_all(sys.argv[1])
