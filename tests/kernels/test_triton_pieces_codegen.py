"""The kernel of the sums of pieces compiled for GPUs: nothing spilled, loads of 16 bytes.

This file is also the program that compiles it: where triton interprets kernels, it compiles none.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def compiled(request):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_register_is_spilled(compiled):
    assert len(compiled) == 12
    assert {one["name"]: one["spilled"] for one in compiled if one["spilled"]} == {}


def test_aligned_gradients_are_read_by_sixteen_bytes(compiled):
    for one in compiled:
        if one["vector"] > 1:
            assert one["loads16"] > 0, one["name"]


# In the compiling process -------------------------------------------------------------------------


def compile_all(name):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sinkgd.kernels.triton import launch, pieces
    from sinkgd.lab.bench.gpu.launches import TARGETS
    from sinkgd.lab.bench.gpu.machine_code import machine_code

    of = TARGETS[name]
    target = GPUTarget(of.backend, of.architecture, of.warp)
    kernel = launch.weighted().add_up_weighted
    types = {
        **dict.fromkeys(["addresses", "pieces", "programs"], "*i64"),
        **dict.fromkeys(["weights", "sums"], "*fp64"),
    }
    for dtype, along, wide in product(pieces.DTYPES, (True, False), (True, False)):
        kind = pieces.Kind(dtype, False, 16 // dtype.itemsize if wide else 1)
        constants = pieces.constants(kind, along=along)
        signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": pieces.THREADS // target.warp_size, "enable_fp_fusion": True}
        built = triton.compile(source, target=target, options=options)
        line = {
            "name": f"{kind} along={along}",
            "vector": kind.vector,
            **asdict(machine_code(built)),
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    compile_all(sys.argv[1])
