"""Options that copy gradients copy a few at a time; on a mesh all ranks the same ones."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sinkgd
from sinkgd.distributed.shards import largest_shard_size
from sinkgd.optim import transform
from spawn import on_ranks

OPTIONS = {
    "deflated": {"deflated_rank": 2},
    "deflated, eager": {"deflated_rank": 2, "backend": "eager"},
    "deflated rows": {"deflated_rank": 2, "last": "row", "rounding": "stochastic"},
    "deflated, pinned": {"deflated_rank": 2, "operator_norm": "muon"},
    "deflated, kept": {"deflated_rank": 2, "deflated_start": "kept"},
    "deflated after momentum": {"deflated_rank": 2, "momentum": 0.5},
    "deflated, projected": {"deflated_rank": 2, "weight_projection": True},
    "projected, held": {"weight_projection": True, "constant_norm": True},
    "held after momentum": {"momentum": 0.5, "momentum_place": "after", "constant_norm": True},
    "low rank": {"momentum_rank": 2},
    "averaged scales, deflated": {"averaged_scales": 0.5, "deflated_rank": 2},
    "masked": {"tiny_rows": "mask", "tiny_row_threshold": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
SHAPES = [(9, 14), (1, 6), (9, 14), (5, 4), (9, 14), (7, 3)]  # a rank may hold nothing of (1, 6)


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walked(options, place=lambda x: x):
    """Take two steps; return the weights, whole."""
    params = [nn.Parameter(place(normal(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = sinkgd.SinkGDVariant([{"params": params, "algorithm": "sinkgd"}], lr=0.1, **options)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = place(normal(SHAPES[i], 10 * step + i).pow(3))
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in params]


def limited(monkeypatch, size):
    monkeypatch.setattr(transform, "SCRATCH_BYTES", size)
    monkeypatch.setattr(transform, "MESH_SCRATCH_BYTES", size)
    monkeypatch.setattr(transform, "MESH_VECTOR_BYTES", 10 * size)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [0, 600, 1200])
def test_how_many_at_a_time_does_not_matter(monkeypatch, name, size):
    together = walked(OPTIONS[name])
    limited(monkeypatch, size)
    assert all(torch.equal(a, b) for a, b in zip(together, walked(OPTIONS[name]), strict=True))


def walked_on_two(size):
    """Return the weights of every entry of the table, by rows and by columns, and what is held."""
    mesh = init_device_mesh("cpu", (2,))
    with pytest.MonkeyPatch.context() as patch:
        limited(patch, size)
        weights = {
            (name, dim): walked(options, lambda x, d=dim: distribute_tensor(x, mesh, [Shard(d)]))
            for name, options in OPTIONS.items()
            for dim in (0, 1)
        }
    pieces = [distribute_tensor(normal(shape, 0), mesh, [Shard(0)]) for shape in SHAPES]
    return weights, [(largest_shard_size(x), x.to_local().numel()) for x in pieces]


@pytest.mark.slow
def test_ranks_take_the_same_ones_whatever_they_hold():
    together, few = on_ranks(2, walked_on_two, 1 << 20), on_ranks(2, walked_on_two, 300)
    for (weights, _), (others, _) in zip(together, few, strict=True):
        for key, own in weights.items():
            assert all(torch.equal(a, b) for a, b in zip(own, others[key], strict=True)), key
    stated = [[most for most, _ in held] for _, held in together]
    assert stated[0] == stated[1] == [max(pair) for pair in zip(*_sizes(together), strict=True)]


def _sizes(found):
    return [[here for _, here in held] for _, held in found]
