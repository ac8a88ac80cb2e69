"""The kernel of weighted sums of squares compiled for GPUs: nothing spilled, loads of 16 bytes.

This file is also the program that compiles it.
"""

import sys
from itertools import product

import pytest

from compiled_for_gpus import build, facts, lines_of, options_for, target_of, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# Instructions that use local memory, at most, by target, type, width of loads, and side. Triton 3.9
# has none of them: ptxas of 3.7 rather spills a number than lets fewer programs run at once.
SPILLS = {
    ("sm_80", "float32", 1, False): 2,
    ("sm_80", "float16", 1, False): 2,
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def compiled(request):
    return lines_of(__file__, request.param)


def test_no_register_is_spilled(compiled):
    assert len(compiled) == 12

    def most(one):
        return SPILLS.get((one["target"], one["dtype"], one["vector"], one["of_rows"]), 0)

    assert {one["name"]: one["spilled"] for one in compiled if one["spilled"] > most(one)} == {}


def test_aligned_gradients_are_read_by_sixteen_bytes(compiled):
    for one in compiled:
        if one["vector"] > 1:
            assert one["loads16"] > 0, one["name"]


# In the compiling process -------------------------------------------------------------------------


def compile_all(name):
    from sinkgd.kernels.triton import launch, shard_sums, support

    target = target_of(name)
    kernel = launch.kernels("square_sums").weighted_square_sums
    types = {
        **dict.fromkeys(["addresses", "matrices", "programs"], "*i64"),
        **dict.fromkeys(["weights", "sums"], "*fp64"),
    }
    for dtype, of_rows, wide in product(support.DTYPES, (True, False), (True, False)):
        kind = shard_sums.Kind(dtype, False, 16 // dtype.itemsize if wide else 1)
        constants = shard_sums.constants_of(kind, of_rows=of_rows)
        options = options_for(shard_sums.options_of, target)
        built = build(kernel, types, constants, target, options)
        line = {
            "target": name,
            "name": f"{kind} of_rows={of_rows}",
            "dtype": str(dtype).removeprefix("torch."),
            "vector": kind.vector,
            "of_rows": of_rows,
        }
        write({**line, **facts(built)})


if __name__ == "__main__":
    compile_all(sys.argv[1])
