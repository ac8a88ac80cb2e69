"""A descent gives the bits of the scales and the update; a parameter is updated whole or not."""

import pytest
import torch

from layouts import scattered, turned
from sinkgd.kernels import Matrices
from sinkgd.kernels.rounding import keys_of_step

FACTORS = {"keep": 0.875, "step": -0.25}


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


# Alone and in batches, small and shared by the threads, as they lie in memory and not.
GRADS = [
    normal((37, 53), 0),
    turned(normal((263, 257), 1)),
    normal((263, 257), 2),
    normal((1, 19), 3),
    normal((19, 1), 4),
    normal((3, 8, 16), 5),
    scattered(normal((64, 48), 6)),
    normal((40, 24), 7, torch.bfloat16),
    normal((40, 24), 8, torch.float16),
    normal((12, 7), 9, torch.float64),
    1e-30 * normal((67, 31), 10),
    torch.zeros(5, 4),
    torch.cat([normal((9, 20), 11), torch.zeros(3, 20)]),
    normal((128, 640), 12),
]


def params_beside(grads):
    """Parameters of the gradients' types and, every third, of another type or order of memory."""
    params = [normal(grad.shape, 100 + i, grad.dtype) for i, grad in enumerate(grads)]
    params[::3] = [param.bfloat16() for param in params[::3]]
    params[1::3] = [turned(param) for param in params[1::3]]
    return params


def of_their_own(grads):
    return [range(i, i + 1) for i in range(len(grads))]


def scales_then_update(backend, matrices, num_iters=5, tol=None):
    scales = backend.scales(matrices.grads, num_iters, tol=tol, starts=matrices.starts)
    params = [param.clone() for param in matrices.params]
    backend.update_(params, matrices.grads, scales, **FACTORS, keys=matrices.keys)
    return params, scales


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("threads", "num_iters", "rounded_at_random", "started"),
    [(1, 4, True, True), (1, 1, False, False), (2, 4, False, False), (3, 5, False, True),
     (2, 5, True, False)],
)  # fmt: skip
def test_it_is_the_scales_and_the_update(
    backend, threads, num_iters, rounded_at_random, started, request
):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    starts = [
        torch.rand(*g.shape[:-2], 1, g.shape[-1], dtype=torch.promote_types(g.dtype, torch.float32))
        for g in GRADS
    ]
    matrices = Matrices(
        params_beside(GRADS),
        GRADS,
        of_their_own(GRADS),
        starts=starts if started else None,
        keys=keys_of_step(3, torch.tensor(5), len(GRADS)).unbind() if rounded_at_random else None,
    )
    expected, scales = scales_then_update(backend, matrices, num_iters)
    versions = [param._version for param in matrices.params]
    found = backend.descend_(matrices, num_iters, **FACTORS)
    assert same_bits(matrices.params, expected)
    assert found.finite.tolist() == [True] * len(GRADS)
    for pair, expected_pair in zip(found.scales, scales, strict=True):
        assert same_bits(pair, expected_pair)
    pairs = zip(matrices.params, versions, strict=True)
    assert all(param._version > version for param, version in pairs)


def test_tol_stops_it_as_it_stops_the_scales(backend):
    grads = [*GRADS[:4], torch.ones(9, 7)]
    matrices = Matrices(params_beside(grads), grads, of_their_own(grads))
    expected, _ = scales_then_update(backend, matrices, 12, tol=1e-2)
    backend.descend_(matrices, 12, **FACTORS, tol=1e-2)
    assert same_bits(matrices.params, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("shape", [(37, 53), (263, 257), (2, 8, 16)], ids=str)
@pytest.mark.parametrize("order", [torch.clone, turned], ids=["rows", "columns"])
def test_a_bad_entry_keeps_its_own_parameter_as_it_was(backend, bad, shape, order):
    grads = [order(normal(shape, seed)) for seed in range(3)]
    matrices = Matrices(params_beside(grads), grads, of_their_own(grads))
    expected, _ = scales_then_update(backend, matrices)
    expected[1] = matrices.params[1].clone()
    grads[1][..., shape[-2] // 2, shape[-1] - 1] = bad
    found = backend.descend_(matrices, 5, **FACTORS)
    assert found.finite.tolist() == [True, False, True]
    assert same_bits(matrices.params, expected)


def test_the_matrices_of_one_owner_stand_or_fall_together(backend):
    grads = [normal((30, 20), seed) for seed in range(6)]
    matrices = Matrices(params_beside(grads), grads, [range(2), range(2, 3), range(3, 6)])
    expected, _ = scales_then_update(backend, matrices)
    expected[3:] = [param.clone() for param in matrices.params[3:]]
    grads[4][3, 4] = torch.nan
    found = backend.descend_(matrices, 5, **FACTORS)
    assert found.finite.tolist() == [True, True, False]
    assert same_bits(matrices.params, expected)


@pytest.mark.parametrize("overflow", [False, True])
def test_after_an_overflow_nothing_is_written(backend, overflow):
    grads = [normal((30, 20)), normal((3, 8, 16))]
    matrices = Matrices(params_beside(grads), grads, of_their_own(grads))
    expected, _ = scales_then_update(backend, matrices)
    if overflow:
        expected = [param.clone() for param in matrices.params]
    found = backend.descend_(matrices, 5, **FACTORS, overflow=torch.tensor(overflow))
    assert found.finite.tolist() == [True, True]
    assert same_bits(matrices.params, expected)
