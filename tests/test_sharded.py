"""Matrices that lie in pieces get the update of the whole, for L messages a group and no gather."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from reference import sinkhorn_knopp
from spawn import on_ranks

FLOAT32 = {"rtol": 3e-6, "atol": 0}
LR = 2.0**-3


class Case(NamedTuple):
    """A matrix and how it lies on a mesh."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    messages: dict[int, int]  # by mesh dimension, of five iterations

    def __str__(self):
        mesh = "x".join(map(str, self.mesh))
        return f"{mesh}-{','.join(map(str, self.placements))}-{'x'.join(map(str, self.shape))}"


ROWS, COLS, EXPERTS, ALL = Shard(0), Shard(1), Shard(0), Replicate()
CASES = [
    Case((2,), (ROWS,), (8, 6), {0: 5}),
    Case((2,), (ROWS,), (7, 5), {0: 5}),
    Case((2,), (ROWS,), (1, 5), {0: 5}),  # the second rank holds none
    Case((2,), (COLS,), (8, 6), {0: 5}),
    Case((2,), (COLS,), (6, 7), {0: 5}),
    Case((2,), (COLS,), (5, 1), {0: 5}),
    Case((2,), (ALL,), (6, 7), {}),
    Case((2,), (EXPERTS,), (4, 6, 5), {0: 1}),  # whether all gradients are finite
    Case((2,), (EXPERTS,), (1, 6, 5), {0: 1}),
    Case((2,), (Shard(1),), (3, 7, 5), {0: 5}),
    Case((2,), (Shard(2),), (3, 7, 5), {0: 5}),
    Case((2,), (ROWS,), (5, 3, 2, 2), {0: 5}),
    Case((2,), (Shard(1),), (5, 3, 2, 2), {0: 5}),
    Case((2,), (ROWS,), (300, 200), {0: 5}),
    Case((4,), (ROWS,), (10, 6), {0: 5}),
    Case((4,), (ROWS,), (3, 6), {0: 5}),  # fewer rows than ranks
    Case((2, 2), (ALL, ROWS), (7, 6), {1: 5}),  # HSDP
    Case((2, 2), (ROWS, COLS), (7, 9), {0: 5, 1: 5}),  # FSDP of a row-wise parallel matrix
    Case((2, 2), (COLS, ROWS), (7, 9), {0: 5, 1: 5}),
    Case((2, 2), (ROWS, ROWS), (9, 6), {0: 5, 1: 5}),
    Case((2, 2), (_StridedShard(0, split_factor=2), ROWS), (10, 6), {0: 5, 1: 5}),
    Case((2, 2), (_StridedShard(0, split_factor=2), ROWS), (3, 6), {0: 5, 1: 5}),
    Case((2, 2), (COLS, COLS), (6, 10), {0: 5, 1: 5}),
    Case((2, 2), (EXPERTS, Shard(1)), (4, 7, 5), {0: 1, 1: 5}),
    Case((2, 2), (ROWS, COLS), (1, 1), {0: 5, 1: 5}),
    Case((2, 2), (ALL, ALL), (6, 5), {}),
]


class Messages(TorchDispatchMode):
    """Counts the collectives while it is open, by name and group."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in {"c10d", "_c10d_functional"}:
            groups = [x for x in args if isinstance(x, torch.ScriptObject)]
            name = dist.ProcessGroup.unbox(groups[0]).group_name if groups else args[-1]
            self.counts[str(func), name] += 1
        return func(*args, **(kwargs or {}))

    def by_dim(self, mesh):
        """All-reduces by mesh dimension; anything else by its name."""
        dims = {mesh.get_group(i).group_name: i for i in range(mesh.ndim)}
        return {
            dims[group] if "allreduce_" in name else name: count
            for (name, group), count in self.counts.items()
        }


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_update(grad, num_iters=5):
    """The float64 oracle, of every matrix of a batch, or a convolution as (out, the rest)."""
    if grad.ndim == 3:
        return torch.stack([expected_update(own, num_iters) for own in grad])
    flat = grad.double().flatten(1)
    plan = sinkhorn_knopp(flat.square(), num_iters)
    return (plan.sqrt() * flat.sign()).view(grad.shape)


def distributed(whole, mesh, placements):
    """Spread a tensor over a mesh; FSDP2's strided shards are cut from those of the other dim."""
    if not isinstance(placements[0], _StridedShard):
        return distribute_tensor(whole, mesh, placements)
    chunks = whole
    for mesh_dim in (1, 0):
        sizes = [len(part) for part in chunks.chunk(mesh.size(mesh_dim))]
        sizes += [0] * (mesh.size(mesh_dim) - len(sizes))
        chunks = chunks.split(sizes)[mesh.get_local_rank(mesh_dim)]
    return DTensor.from_local(
        chunks.clone(), mesh, placements, shape=whole.shape, stride=whole.stride()
    )


def sharded(mesh, placements, whole, grad):
    param = nn.Parameter(distributed(whole, mesh, placements))
    param.grad = distributed(grad, mesh, placements)
    return param


def updates_of(cases):
    """Step each case's matrix, from zero; return its update and its messages."""
    found = {}
    for case in cases:
        mesh = init_device_mesh("cpu", case.mesh)
        grad = normal(case.shape)
        param = sharded(mesh, case.placements, torch.zeros(case.shape), grad)
        optimizer = sinkgd.SinkGD([("w", param)], lr=LR)
        with Messages() as messages:
            optimizer.step()
        update = -param.detach().full_tensor() / LR
        found[str(case)] = update, messages.by_dim(mesh)
    return found


@pytest.fixture(scope="module")
def updates():
    found = {}
    for world_size in (2, 4):
        own = [case for case in CASES if torch.Size(case.mesh).numel() == world_size]
        for of_rank in on_ranks(world_size, updates_of, own):
            for name, result in of_rank.items():
                found.setdefault(name, []).append(result)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_has_its_piece_of_the_update(updates, case):
    expected = expected_update(normal(case.shape))
    for update, _ in updates[str(case)]:
        assert_close(update.double(), expected, **FLOAT32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_messages_are_as_many_as_iterations_and_nothing_is_gathered(updates, case):
    assert [messages for _, messages in updates[str(case)]] == [case.messages] * len(
        updates[str(case)]
    )
