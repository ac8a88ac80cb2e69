"""The models whose steps are counted, and the GPU whose cache and processors they are counted for.

A shape ``(..., m, n)`` is a parameter's; leading dimensions are experts.
"""

from collections import Counter

from sinkgd.lab.bench.workloads import Shape, matrix_shapes

# An H100's L2 cache holds 50 MiB, and the backend keeps a bucket in half of it.
CACHE_BYTES = 25 << 20
PROCESSORS = 132

LLAMAS = ("llama-60m", "llama-1b", "llama-7b")

# Hidden size, inner size, key and value rows, experts of a layer, layers. The first is Mixtral
# 8x7B's; the second is of DeepSeekMoE 16B's kind, which has many small experts.
_MIXTURES = {
    "mixtral-8x7b": (4096, 14336, 1024, 8, 32),
    "moe-64-experts": (2048, 1408, 2048, 64, 27),
}
MODELS = (*LLAMAS, *_MIXTURES)


def matrices_of(model: str) -> tuple[Shape, ...]:
    """Return the shapes of a model's hidden matrices, experts of a layer in one parameter.

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
    """Return each shape of a model once; of experts two, which lie as all of them do."""
    shapes = Counter(matrices_of(model))
    return tuple((2, *shape[1:]) if len(shape) > 2 else shape for shape in shapes)
