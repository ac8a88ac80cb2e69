"""Finite gradients of any size are never taken for NaN, and never write what is not finite."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing import assert_close

import sinkgd
from optimizer_cases import OPTIMIZERS
from spawn import on_ranks

LARGEST = torch.finfo(torch.float32).max
SHAPE = (8, 6)


def gradient(kind):
    """Return a gradient that fills float32's range."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(SHAPE, dtype=torch.float64, generator=generator).clamp(-1, 1)
    if kind == "largest":
        return (grad * LARGEST).float()
    if kind == "smallest":
        return (grad * 1e-36).float()
    if kind == "diagonal":
        return torch.logspace(-38, 38, 6, dtype=torch.float64).diag_embed().float()
    if kind == "beyond":  # further apart than both scales can be
        return torch.tensor([LARGEST, *[1e-38] * 5]).expand(SHAPE).contiguous()
    decades, side = kind.split()
    length = SHAPE[0 if side == "rows" else 1]
    sizes = 10 ** torch.linspace(38 - int(decades), 38, length, dtype=torch.float64)
    return (grad * (sizes[:, None] if side == "rows" else sizes)).float()


def _deflated(norm):
    """Return what builds SinkGD with deflation and an operator norm."""
    return lambda params, lr: sinkgd.SinkGD(
        [{"params": params, "algorithm": "sinkgd", "deflated_rank": 2, "operator_norm": norm}],
        lr=lr,
    )


KINDS = [
    "largest",
    "smallest",
    *(f"{n} {side}" for n in (45, 60, 70) for side in ("rows", "columns")),
]
kinds = pytest.mark.parametrize("kind", KINDS)


BUILDS = {str(case): case.build for case in OPTIMIZERS} | {
    f"deflated, {norm}": _deflated(norm) for norm in (None, "unit", "muon")
}

WITHOUT_FLOAT64 = {str(case) for case in OPTIMIZERS if not case.takes_float64}


@pytest.mark.parametrize("kind", [*KINDS, "diagonal", "beyond"])
@pytest.mark.parametrize("name", BUILDS)
def test_weights_stay_finite(name, kind):
    weight = nn.Parameter(torch.zeros_like(gradient(kind)))
    optimizer = BUILDS[name]([weight], lr=1e-3)
    # As torch's: the squares of such gradients overflow, and so may the averages of both signs.
    if name in ("SinkGD-adamw", "SPAM") and gradient(kind).abs().max() > 1e38:
        pytest.skip("AdamW's averages have no room for it")
    for step in range(4):
        weight.grad = gradient(kind) * (-1) ** (step // 2)
        optimizer.step()
        assert weight.isfinite().all()


OPTIONS = {
    "plain": {},
    "last row": {"last": "row"},
    "first column": {"first": "column"},
    "rows to rows": {"first": "row", "last": "row"},
    "warm start": {"warm_start": True},
    "tol": {"tol": 0.01},
    "deflated": {"deflated_rank": 1},
    "momentum": {"momentum": 0.9, "nesterov": True},
}


@kinds
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_is_that_of_a_type_with_room(options, backend, kind):
    updates = []
    for dtype, own in ((torch.float32, backend), (torch.float64, "eager")):
        weight = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
        optimizer = sinkgd.SinkGDVariant([weight], lr=1.0, backend=own, **options)
        for _ in range(2):
            weight.grad = gradient(kind).to(dtype)
            optimizer.step()
        updates.append(weight.detach().double())
    assert_close(*updates, rtol=1e-3, atol=1e-4)


IN_PIECES = {name: options for name, options in OPTIONS.items() if name != "warm start"}


def step_in_pieces(dim):
    """Take a step with each option along every kind of gradient, in pieces."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, options in IN_PIECES.items():
        weights = [nn.Parameter(torch.zeros(SHAPE)) for _ in KINDS]
        params = [nn.Parameter(distribute_tensor(w.detach(), mesh, [Shard(dim)])) for w in weights]
        for param, kind in zip(params, KINDS, strict=True):
            param.grad = distribute_tensor(gradient(kind), mesh, [Shard(dim)])
        sinkgd.SinkGDVariant(params, lr=1.0, **options).step()
        found[name] = [param.detach().full_tensor() for param in params]
    return found


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_a_step_in_pieces_is_that_of_a_type_with_room(dim):
    (found, _) = on_ranks(2, step_in_pieces, dim)
    for name, options in IN_PIECES.items():
        weights = [nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)) for _ in KINDS]
        for weight, kind in zip(weights, KINDS, strict=True):
            weight.grad = gradient(kind).double()
        sinkgd.SinkGDVariant(weights, lr=1.0, backend="eager", **options).step()
        for weight, kind, own in zip(weights, KINDS, found[name], strict=True):
            expected = weight.detach()
            assert_close(own.double(), expected, rtol=1e-3, atol=1e-4, msg=f"{name}, {kind}")


@pytest.mark.parametrize("size", [1e140, 1e-140])
@pytest.mark.parametrize("name", BUILDS)
def test_float64_has_more_room(name, size):
    if name in WITHOUT_FLOAT64:
        pytest.skip("it refuses float64")
    weight = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = BUILDS[name]([weight], lr=1e-3)
    for _ in range(3):
        weight.grad = gradient("largest").double() / LARGEST * size
        optimizer.step()
    assert weight.isfinite().all()
