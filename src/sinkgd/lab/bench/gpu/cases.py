"""What is counted: models, kinds of steps, and kinds of GPU; and the processes that count.

A shape ``(..., m, n)`` is the shape of a parameter; its leading dimensions are experts.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.workloads import Shape, matrix_shapes

# An H100's L2 cache holds 50 MiB. The backend keeps a bucket, which is a set of matrices that it
# launches together, in half of that.
CACHE_BYTES = 25 << 20

LLAMAS = ("llama-60m", "llama-1b", "llama-7b")

# Hidden size, inner size, key and value rows, experts per layer, layers. The first model has the
# sizes of Mixtral 8x7B; the second is like DeepSeekMoE 16B, which has many small experts.
_MIXTURES = {
    "mixtral-8x7b": (4096, 14336, 1024, 8, 32),
    "moe-64-experts": (2048, 1408, 2048, 64, 27),
}
MODELS = (*LLAMAS, *_MIXTURES)

RANK = 15  # number of directions that the recommended recipe deflates

# The kinds of steps: options of `recorded.take_step`.
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflated": {"deflated_rank": RANK},
    "stochastic": {"rounding": "stochastic"},
    "cautious": {"weight_decay": 0.1, "cautious_decay": True},
    "cautious stochastic deflated": {
        "weight_decay": 0.1,
        "cautious_decay": True,
        "rounding": "stochastic",
        "deflated_rank": RANK,
    },
    "transposed": {"transposed": True},
    "transposed deflated": {"transposed": True, "deflated_rank": RANK},
    "tolerance": {"tol": 1e-3},
    "transposed tolerance": {"transposed": True, "tol": 1e-3},
    "warm start": {"warm_start": True},
    "transposed warm start": {"transposed": True, "warm_start": True},
    "rate on the device": {"on_device": True},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "float32 weights": {"param_dtype": "float32"},
    "half iterations": {"whole_rows": False},
}
# The steps whose kernels `sinkgd bench gpu` compiles.
USUAL = ("plain", "deflated", "stochastic")


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    name: str
    backend: str  # "cuda" or "hip"
    architecture: int | str
    warp: int  # number of threads that run together


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32),
        Target("sm_90", "cuda", 90, 32),
        Target("sm_100", "cuda", 100, 32),
        Target("gfx942", "hip", "gfx942", 64),
    )
}


def matrices_of(model: str) -> tuple[Shape, ...]:
    """Return the shapes of a model's hidden matrices, with a layer's experts in one parameter.

    Examples:
        >>> sorted(set(matrices_of("moe-64-experts")))
        [(64, 1408, 2048), (64, 2048, 1408), (2048, 2048)]
    """
    if model not in _MIXTURES:
        return matrix_shapes(model)
    h, inner, kv, experts, layers = _MIXTURES[model]
    attention: list[Shape] = [(h, h), (kv, h), (kv, h), (h, h)]
    mixture: list[Shape] = [(experts, inner, h), (experts, inner, h), (experts, h, inner)]
    return tuple(attention + mixture) * layers


def distinct(model: str) -> tuple[Shape, ...]:
    """Return each shape of a model once, with two experts if there are more."""
    shapes = Counter(matrices_of(model))
    return tuple((2, *shape[1:]) if len(shape) > 2 else shape for shape in shapes)


def environment(*, interprets: bool) -> dict[str, str]:
    """Return the environment of a process in which triton interprets kernels, or compiles them.

    Triton reads the environment when it is imported, so one process cannot do both.
    """
    found = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if not interprets:
        del found["TRITON_INTERPRET"]
    return found


def output_of(module: str, function: str, *, interprets: bool) -> str:
    """Call a function in a new process, without arguments, and return its standard output.

    Raises:
        RuntimeError: If the process fails; the message is its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(interprets=interprets),
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout
