"""The kernels of deflation compiled for GPUs: no spills, loads of 16 bytes, known tensor cores.

This file is also the program that compiles them. Nothing is timed.
"""

import re
import sys
from collections import Counter

import pytest

from compiled_for_gpus import build, facts, lines_of, options_for, target_of, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Matrices of llama 60m, 1b and 7b have two kinds of rows.
ALIGNED, ODD = (2048, 2048), (2048, 5461)
# Instructions that a thread issues an entry of bfloat16 on sm_90, in the loop over tiles of a
# product, and in all of an update.
MOST = {
    "matmul": {ALIGNED: 4, ODD: 10.5},
    "matmul, squares": {ALIGNED: 9.5, ODD: 14},
    "matmul_transposed": {ALIGNED: 5, ODD: 17},
    "update": {ALIGNED: 26, ODD: 66},
}
# Instructions that use local memory, at most, by target, kind, type, shape, and K. Triton 3.9 has
# none of them: ptxas of 3.7 rather spills a few than lets fewer programs run at once.
SPILLS = {
    ("sm_80", "matmul, squares", "bfloat16", ODD, 16): 7,
    ("sm_80", "update, cautious", "float32", ALIGNED, 16): 2,
}
# How matrices are multiplied, by the target and the type of the gradient.
TENSOR_CORES = {
    ("sm_80", "bfloat16"): "HMMA.16816.F32.BF16",
    ("sm_80", "float32"): "HMMA.1688.F32.TF32",
    ("sm_90", "bfloat16"): "HGMMA.64x16x16.F32.BF16",
    ("sm_90", "float32"): "GMMA.64x16x8.F32.TF32|HMMA.1688.F32.TF32",
    ("sm_100", "bfloat16"): "UTCHMMA",
    ("sm_100", "float32"): "UTCHMMA|HMMA.1688.F32.TF32",
    ("gfx942", "bfloat16"): "v_mfma_f32_16x16x16_bf16",
    ("gfx942", "float32"): "v_mfma_f32_16x16x4_f32",
}


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """What the compiler says of every kernel for one target."""
    return lines_of(__file__, request.param)


def test_no_register_is_spilled(compiled):
    def most(one):
        shape = one["shape"] and tuple(one["shape"])
        return SPILLS.get((one["target"], one["kind"], one["dtype"], shape, one["K"]), 0)

    assert {one["name"]: one["spilled"] for one in compiled if one["spilled"] > most(one)} == {}


def test_aligned_gradients_are_read_by_sixteen_bytes_alone(compiled):
    for one in compiled:
        # Those of float16 are narrower on sm_90 and sm_100 where they are widened for a product.
        if one["vector"] > 1 and one["dtype"] != "float16":
            assert one["loads16"] >= one["entries"] * one["bytes"] / 16, one["name"]


def test_products_are_those_of_tensor_cores_and_of_the_right_numbers(compiled):
    for one in compiled:
        if (one["target"], one["dtype"]) in TENSOR_CORES and one["K"] == 16:
            assert one["products"], one["name"]
            if one["kind"].startswith("update"):  # of float32, whatever the gradient
                continue
            wanted = TENSOR_CORES[one["target"], one["dtype"]]
            assert all(re.search(wanted, name) for name in one["products"]), one


def test_instructions_an_entry(compiled):
    if compiled[0]["target"] != "sm_90":
        pytest.skip("the disassembly is counted for sm_90")
    seen = set()
    for one in compiled:
        is_usual = one["dtype"] == "bfloat16" and one["K"] == 16 and not one["turned"]
        if is_usual and one["kind"] in MOST:
            seen.add((one["kind"], one["shape"][1]))
            assert one["cost"] <= MOST[one["kind"]][tuple(one["shape"])], one
    assert seen == {(kind, shape[1]) for kind in MOST for shape in (ALIGNED, ODD)}


# In the compiling process -------------------------------------------------------------------------


POINTERS = {
    **dict.fromkeys(["addresses", "matrices", "owners", "programs"], "*i64"),
    **dict.fromkeys(["powers", "squares", "result"], "*fp32"),
    "given": "*fp64",
}
NUMBERS = {
    **dict.fromkeys(["first", "width"], "i32"),
    **dict.fromkeys(["one", "keep", "step"], "fp32"),
}


def products(is_hip):
    """Yield (kind, kernel, constants, shape, dtype, turned) of what steps multiply with."""
    import torch

    from sinkgd.kernels.triton import launch
    from sinkgd.kernels.triton.product_plan import Kind
    from sinkgd.kernels.triton.products import constants_of, splits_of

    kernels = launch.kernels("skinny_matmul")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        splits = splits_of(dtype, tf32=not is_hip)
        for shape in (ALIGNED, ODD):
            vector = 16 // dtype.itemsize if shape == ALIGNED else 1
            kind = Kind(dtype, False, vector)
            for K in (16, 32) if (dtype, shape) == (torch.bfloat16, ALIGNED) else (16,):
                for name in ("matmul", "matmul_transposed"):
                    known = constants_of(kind, K, splits, transposed=name != "matmul")
                    for squares in (False, True):
                        constants = {**known, "SQUARES": squares, "SCALE_RESULT": True}
                        label = f"{name}, squares" if squares else name
                        # A transposed matrix has its squares from `matmul_transposed`.
                        yield (
                            label,
                            getattr(kernels, name),
                            constants,
                            shape,
                            dtype,
                            (squares and name == "matmul_transposed"),
                        )
        for of_rows in (True, False):
            constants = {"OF_ROWS": of_rows, "SHARED": of_rows, "K": 16, "SPLITS": splits}
            yield "scale_vectors", kernels.scale_vectors, constants, None, dtype, False
    yield "balance_scales", kernels.balance_scales, {}, None, torch.float32, False


def updates(is_hip):
    """Yield the same of updates, with the compiler's options."""
    import torch

    from sinkgd.kernels.layout import layout_of
    from sinkgd.kernels.triton import launch
    from sinkgd.kernels.triton.half_iterations import LowRankSides, UpdateOperands, plan_of_update
    from sinkgd.kernels.triton.tables import Operand

    dtypes = launch.kernels("primitives").DTYPES
    for dtype, grad_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        for shape, K, dense, cautious in (
            *((ALIGNED, 16, True, False), (ALIGNED, 16, False, False), (ALIGNED, 32, True, False)),
            *((ODD, 16, True, False), ((20, 8192), 32, True, False)),
            *((ALIGNED, 16, True, True), (ALIGNED, 32, True, True), (ODD, 16, True, True)),
        ):
            size = torch.Size(shape)
            lies = [
                Operand(one, layout_of(size, (shape[1], 1)), True) for one in (dtype, grad_dtype)
            ]
            strides = (K, 1) if dense else (1, 4096)
            to = UpdateOperands(*lies, LowRankSides(K, strides, (K, 1), True))
            kind = plan_of_update((to,), (size,), 1 << 30).buckets[0].kind
            assert (kind.rank, kind.is_dense) == (K, dense)
            constants = {
                "DTYPE": dtypes[dtype],
                "GRAD_DTYPE": dtypes[grad_dtype],
                "BM": kind.tile.BM,
                "BN": kind.tile.BN,
                "VECTOR": kind.vector,
                "KEEP_IS_STORED": False,
                "STEP_IS_STORED": False,
                "ROUND": K == 32 and dtype == torch.bfloat16,
                "CAUTIOUS": cautious,
                "TF32": not is_hip,
                "K": K,
                "DENSE": dense,
            }
            label = "update" if (dtype, dense) == (grad_dtype, True) else "update of a mix"
            if cautious:
                label += ", cautious"
            yield (
                label,
                launch.kernels("update").update,
                constants,
                shape,
                dtype,
                shape == (20, 8192),
            )


def compile_all(name):
    from sinkgd.kernels.triton import half_iterations
    from sinkgd.kernels.triton import products as module

    target = target_of(name)
    is_hip = target.backend == "hip"
    for kind, kernel, constants, shape, dtype, turned in [*products(is_hip), *updates(is_hip)]:
        wide = constants.get("VECTOR") != 1
        if "update" in kind:
            options = options_for(half_iterations.options_of, target, wide=wide, product=True)
        else:
            options = options_for(module.options_of, target, wide=wide)
        scaled = "*bf16" if constants.get("SPLITS") == 3 else "*fp32"
        types = {**POINTERS, **NUMBERS, **dict.fromkeys(["scaled", "scaled_result"], scaled)}
        built = build(kernel, types, constants, target, options)
        tile = constants.get("BM", 64) * constants.get("BN", 64)
        entries = tile / (options["num_warps"] * target.warp_size) if shape else 0
        line = {
            "target": name,
            "name": f"{kind} {dtype} {shape} {constants}",
            "kind": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": shape,
            "turned": turned,
            "entries": entries,
            "vector": constants.get("VECTOR", 1),
            "bytes": dtype.itemsize,
            "K": constants.get("K", 0) if shape else 0,
            "shared": built.metadata.shared,
            **facts(built),
        }
        if is_hip:
            line["products"] = Counter(re.findall(r"v_mfma_\w+", built.asm["amdgcn"]))
        else:
            line |= products_and_cost(built, entries, line["loops"], in_loop="update" not in kind)
        write(line)


def products_and_cost(built, entries, loops, *, in_loop):
    """Return how often tensor cores are used, and the instructions an entry."""
    from sinkgd.lab.bench.gpu.variants import disassembled

    text = disassembled(built.asm["cubin"])
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
    used = max(loops, default=0) if in_loop else len(instructions)
    return {
        "products": Counter(
            name for one in instructions for name in re.findall(r"\w*MMA[.\w]*", one)
        ),
        "cost": used / entries if entries else 0,
    }


if __name__ == "__main__":
    compile_all(sys.argv[1])
