"""The tempered update of matrices that lie in pieces is that of the whole, and only sums travel."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing import assert_close

import sinkgd
from reference import tempered
from spawn import on_ranks
from test_sharded import CASES, LR, Case, Messages, normal, sharded

TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}
# Of a matrix in pieces: whether all is finite, the vectors, and two numbers at the end.
MORE = 2
VECTORS = [
    Case((2,), (Shard(0),), (9,), {0: 2}),
    Case((2,), (Shard(0),), (1,), {0: 2}),  # the second rank holds none
    Case((2,), (Replicate(),), (9,), {}),
    Case((2,), (Replicate(),), (), {}),
    Case((2, 2), (Shard(0), Shard(0)), (9,), {0: 2, 1: 2}),
]


def updates_of(cases):
    """Step each case's parameter, from zero; return its update and its messages."""
    found = {}
    for case in cases:
        mesh = init_device_mesh("cpu", case.mesh)
        param = sharded(mesh, case.placements, torch.zeros(case.shape), normal(case.shape))
        optimizer = sinkgd.TemperedSinkGD([("w", param)], lr=LR)
        with Messages() as messages:
            optimizer.step()
        found[str(case)] = -param.detach().full_tensor() / LR, messages.by_dim(mesh)
    return found


def together():
    """All kinds of placements in one step, with gradients of any size; and one that is bad."""
    mesh = init_device_mesh("cpu", (2, 2))
    rows, columns, whole = Shard(0), Shard(1), Replicate()
    placements = [(rows, rows), (rows, columns), (rows, whole), (whole, columns), (rows, columns)]
    params = [
        sharded(mesh, own, torch.zeros(7, 6), normal((7, 6), i) * 10.0 ** (15 * i - 30))
        for i, own in enumerate(placements)
    ]
    params[4].grad.to_local().fill_(torch.nan if mesh.get_rank() == 1 else 1)
    optimizer = sinkgd.TemperedSinkGD(params, lr=LR, nonfinite="skip")
    with Messages() as messages:
        optimizer.step()
    updates = [-param.detach().full_tensor() / LR for param in params]
    return {"together": (updates, messages.by_dim(mesh), optimizer.skipped())}


def on_four(cases):
    return updates_of(cases) | together()


@pytest.fixture(scope="module")
def found():
    results = {}
    for world_size, function in ((2, updates_of), (4, on_four)):
        own = [case for case in CASES + VECTORS if torch.Size(case.mesh).numel() == world_size]
        for of_rank in on_ranks(world_size, function, own):
            for name, result in of_rank.items():
                results.setdefault(name, []).append(result)
    return results


def expected_update(grad):
    if grad.ndim == 3:
        return torch.stack([expected_update(own) for own in grad])
    if grad.ndim >= 2:
        return tempered(grad.flatten(1), 0.1, 5, 1e-8).view(grad.shape)
    wide = grad.double()
    return torch.tanh(wide / (wide.abs().sum() if grad.ndim else 1) / 0.1)


@pytest.mark.parametrize("case", CASES + VECTORS, ids=str)
def test_every_rank_has_its_piece_of_the_update(found, case):
    for update, _ in found[str(case)]:
        assert_close(update.double(), expected_update(normal(case.shape)), **TOLERANCE)


@pytest.mark.parametrize("case", CASES + VECTORS, ids=str)
def test_messages_are_few_and_nothing_is_gathered(found, case):
    expected = {dim: count + MORE if count == 5 else count for dim, count in case.messages.items()}
    assert [messages for _, messages in found[str(case)]] == [expected] * len(found[str(case)])


def test_matrices_of_all_placements_share_their_messages_and_a_bad_one_is_left_out(found):
    for updates, messages, skipped in found["together"]:
        assert messages == {0: 5 + MORE, 1: 5 + MORE}
        assert skipped == {"parameter 4 of group 0": 1}
        assert updates[4].eq(0).all()
        for i, update in enumerate(updates[:4]):
            size = 10.0 ** (15 * i - 30)
            expected = expected_update(normal((7, 6), i) * size)
            assert_close(update.double() / size, expected / size, **TOLERANCE)
