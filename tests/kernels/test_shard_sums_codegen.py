"""The kernel of weighted sums of squares compiled for GPUs: nothing spilled, loads of 16 bytes.

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

    from sinkgd.kernels.triton import launch, shard_sums, support
    from sinkgd.lab.bench.gpu.cases import TARGETS
    from sinkgd.lab.bench.gpu.variants import machine_code

    of = TARGETS[name]
    target = GPUTarget(of.backend, of.architecture, of.warp)
    kernel = launch.kernels("square_sums").weighted_square_sums
    types = {
        **dict.fromkeys(["addresses", "matrices", "programs"], "*i64"),
        **dict.fromkeys(["weights", "sums"], "*fp64"),
    }
    for dtype, of_rows, wide in product(support.DTYPES, (True, False), (True, False)):
        kind = shard_sums.Kind(dtype, False, 16 // dtype.itemsize if wide else 1)
        constants = shard_sums.constants_of(kind, of_rows=of_rows)
        signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        source = ASTSource(kernel, signature, constants, aligned)
        options = shard_sums.options_of(launch.GpuTarget(target.backend, target.warp_size))
        built = triton.compile(source, target=target, options=options)
        line = {
            "name": f"{kind} of_rows={of_rows}",
            "vector": kind.vector,
            **asdict(machine_code(built)),
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    compile_all(sys.argv[1])
