"""Gradients of few directions: small batches, rarely used experts, heads that see few tokens.

Whatever the rank of a finite gradient, the update is finite, of root-mean-square 1, no more peaked
than SR-Sinkhorn leaves it, and the same on all backends.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing import assert_close

import sinkgd
from optimizer_cases import OPTIMIZERS
from sinkgd.exchange import computation
from sinkgd.optim.transforms import deflate
from spawn import on_ranks
from test_sharded import sharded

RANK = 4  # directions that are lowered
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def of_rank(shape, rank, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    m, n = shape
    left, right = torch.randn(m, rank, generator=random), torch.randn(rank, n, generator=random)
    return (left @ right).to(dtype)


def update(grad, **options):
    """Return what a step of rate 1 subtracts from zero weights."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    sinkgd.SinkGD([param], lr=1.0, **{"deflated_rank": RANK, **options}).step()
    return -param.detach().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(24, 17), (17, 24), (16, 16), (5, 40), (2, 3), (3, 12, 9)], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_updates_have_size_one_and_are_no_more_peaked_than_before(backend, shape, dtype):
    for rank in range(1, 3 * RANK + 1):
        check_update(shape, rank, dtype, backend)


def check_update(shape, rank, dtype, backend):
    grad = torch.stack([of_rank(shape[-2:], rank, seed, dtype) for seed in range(3)])
    grad = grad if len(shape) == 3 else grad[0]
    found = update(grad, backend=backend)
    assert_close(
        found.square().mean((-2, -1)).sqrt(),
        torch.ones(()).double().expand(shape[:-2]),
        rtol=2e-3,
        atol=0,
    )
    before = torch.linalg.svdvals(update(grad, deflated_rank=0, backend=backend))
    after = torch.linalg.svdvals(found)
    directions = min(rank, *shape[-2:]) - 1
    assert (
        after[..., 0] / after[..., directions] <= 1.1 * before[..., 0] / before[..., directions]
    ).all()


@pytest.mark.parametrize("rank", [1, RANK, RANK + 1, 2 * RANK])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_backends_agree_on_gradients_of_few_directions(every_backend, rank, dtype):
    grad = of_rank((48, 80), rank, dtype=dtype)
    expected = update(grad.double())
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2  # a bfloat16 weight is rounded at the end
    assert (update(grad) - expected).norm() <= tolerance * expected.norm()


# On a mesh ----------------------------------------------------------------------------------------

MESH_GRADS = [((12, 20), rank) for rank in (1, RANK, RANK + 1, 9)]
PLACEMENTS = [(Shard(0), Replicate()), (Shard(1), Replicate()), (Shard(0), Shard(1))]


def updates_on_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2))
    params = [
        sharded(mesh, places, torch.zeros(shape), of_rank(shape, rank))
        for places in PLACEMENTS
        for shape, rank in MESH_GRADS
    ]
    group = {"params": params, "algorithm": "sinkgd", "deflated_rank": RANK}
    sinkgd.SinkGD([group], lr=1.0).step()
    return [-param.detach().full_tensor() for param in params]


@pytest.mark.slow
def test_a_mesh_takes_the_same_step_whatever_the_rank():
    whole = [update(of_rank(shape, rank)).float() for shape, rank in MESH_GRADS]
    for found in on_ranks(4, updates_on_a_mesh):
        assert_close(found, whole * len(PLACEMENTS), rtol=0, atol=2e-3)


# Any finite gradient ------------------------------------------------------------------------------


def degenerate(kind, shape, seed):
    random = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=random)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "one entry":
        return torch.zeros(shape).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(3.0))
    if kind == "rank one":
        return of_rank(shape, 1, seed)
    if kind == "equal entries":
        return torch.full(shape, 2.0)
    if kind == "rows of all sizes":
        return grad * 10.0 ** torch.linspace(-15, 15, shape[0])[:, None]
    if kind == "columns of all sizes":
        return grad * 10.0 ** torch.linspace(-15, 15, shape[1])
    if kind == "subnormal":
        return grad * 1e-40
    assert kind == "huge"
    return grad.clamp(-1, 1) * 1e37


KINDS = [
    "zero", "one entry", "rank one", "equal entries", "rows of all sizes", "columns of all sizes",
    "subnormal", "huge",
]  # fmt: skip
DEFLATED = [
    ("deflated", lambda params: sinkgd.SinkGD(params, lr=1e-3, deflated_rank=RANK)),
    ("deflated-eager", lambda p: sinkgd.SinkGD(p, 1e-3, deflated_rank=RANK, backend="eager")),
]
CASES = [(str(case), lambda params, case=case: case.build(params)) for case in OPTIMIZERS]
# Moments of squares overflow from 1e19 on, as torch's AdamW's do.
SMALL_GRADIENTS_ONLY = ("adamw", "sage", "spam")
LARGE = ("rows of all sizes", "columns of all sizes", "huge")


def takes_any(name):
    return not any(word in name.lower() for word in SMALL_GRADIENTS_ONLY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "build"), [*DEFLATED, *CASES], ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_finite_gradient_leaves_finite_weights(name, build, kind):
    if kind in LARGE and not takes_any(name):
        return
    for shape in [(9, 14), (14, 9), (6, 6), (2, 30)]:
        param = nn.Parameter(torch.ones(shape))
        optimizer = build([param])
        for seed in range(3):
            param.grad = degenerate(kind, shape, seed)
            optimizer.step()
        assert param.isfinite().all(), shape
        assert not optimizer.skipped()


@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 3), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_guard_looks_at_the_update_that_is_written(m, n, rank, seed):
    """Rank-one steps, as at batch one, taken many times: weights never become NaN."""
    param = nn.Parameter(torch.zeros(m, n))
    optimizer = sinkgd.SinkGD([param], lr=1e-2, deflated_rank=RANK, backend="eager")
    for step in range(5):
        param.grad = of_rank((m, n), rank, seed * 5 + step)
        optimizer.step()
        assert param.isfinite().all()


def test_an_update_that_is_not_finite_is_not_written(monkeypatch):
    """Should deflation ever fail, its parameter stays as it was, and the guard names it."""

    @computation
    def broken(*args):
        found = yield find_leading(*args)
        return [one._replace(square=one.square * float("nan")) for one in found]

    find_leading = deflate.find_leading
    monkeypatch.setattr(deflate, "find_leading", broken)
    param, other = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(1, 8))
    optimizer = sinkgd.SinkGD(
        [("w", param), ("row", other)], lr=0.1, deflated_rank=2, nonfinite="skip"
    )
    param.grad, other.grad = of_rank((6, 8), 3), torch.ones(1, 8)
    optimizer.step()
    assert param.eq(1).all()
    assert not other.eq(1).all()
    assert optimizer.skipped() == {"w": 1}


NEAR_THE_END = [
    case for case in OPTIMIZERS if case.name in ("SinkGD-sage", "SinkGD-pinned", "SinkGD-table")
]


@pytest.mark.parametrize("case", NEAR_THE_END, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("size", [1e36, 1e38])
@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (1000, 3)], ids=str)
def test_sums_that_overflow_are_not_written(case, dtype, size, shape):
    """A finite gradient whose sums leave float32 counts as skipped; the next step is a step."""
    param = nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = case.build([param], lr=0.1, nonfinite="skip")
    small = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    param.grad = (small * size).to(dtype)
    optimizer.step()
    assert param.isfinite().all()
    assert bool(optimizer.skipped()) == bool(param.eq(1).all())
    state = optimizer.state[param].values()
    assert all(x.isfinite().all() for x in state if isinstance(x, torch.Tensor))
    before = param.detach().clone()
    param.grad = small.to(dtype)
    optimizer.step()
    assert param.isfinite().all()
    assert param.ne(before).any()


def updates(grads, **options):
    """Return the updates of one step after the other."""
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = sinkgd.SinkGDVariant([param], lr=1.0, **{"deflated_rank": RANK, **options})
    found = []
    for grad in grads:
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        found.append((before - param.detach()).double())
    return found, optimizer.state[param]


def lowered_exactly(grad):
    """Return SR-Sinkhorn's update with its leading singular values lowered, and of size one."""
    left, lengths, right = torch.linalg.svd(sinkgd.sr_sinkhorn(grad).double(), full_matrices=False)
    x = left @ lengths.clamp(max=lengths[RANK]).diag() @ right
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("shape", [(24, 17), (17, 24)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_kept_directions_approach_the_singular_vectors(backend, shape):
    grad = of_rank(shape, 9) + 0.3 * of_rank(shape, 17, seed=1)
    (first, *_, last), _ = updates([grad] * 60, deflated_start="kept", backend=backend)
    assert_close(first, update(grad), rtol=1e-4, atol=1e-4)
    assert_close(last, lowered_exactly(grad), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, RANK, RANK + 1])
def test_kept_directions_that_an_update_does_not_have_are_found_again(rank):
    few = [of_rank((24, 17), rank, seed=2)] * 3
    many = [of_rank((24, 17), 9) + 0.3 * of_rank((24, 17), 17, seed=1)] * 60
    found, state = updates([*few, *many], deflated_start="kept")
    assert_close(found[-1], lowered_exactly(many[0]), rtol=1e-3, atol=1e-3)
    (kept,) = state.values()
    assert kept.dtype == torch.float32
    assert kept.shape == (RANK + 1, 17)
