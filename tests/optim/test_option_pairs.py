"""Any two options together, in pieces or released inside backward, take the ordinary step."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.testing import assert_close

import sinkgd
from option_reference import Expected
from spawn import on_ranks
from test_sharded import Messages, distributed, normal

STEPS = 2
SHAPES = [(10, 6), (3, 10, 8)]  # the last is a batch, such as experts

OPTIONS = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "after": {"momentum": 0.5, "momentum_place": "after"},
    "8 bits": {"momentum": 0.5, "momentum_place": "after", "momentum_bits": 8},
    "low rank": {"momentum_rank": 2, "low_rank_momentum": 0.9},
    "cross-fit": {"cross_fit": True},
    "averaged scales": {"averaged_scales": 0.75},
    "last row": {"last": "row"},
    "first column": {"first": "column"},
    "table": {"first": "row", "last": "row"},
    "mask": {"tiny_rows": "mask", "tiny_row_threshold": 0.8},
    "deflated": {"deflated_rank": 2},
    "deflated, kept": {"deflated_rank": 2, "deflated_start": "kept"},
    "unit": {"operator_norm": "unit"},
    "muon": {"operator_norm": "muon"},
    "projected": {"weight_projection": True},
    "held": {"constant_norm": True},
    "warm start": {"warm_start": True},
    "tol": {"tol": 0.05, "sinkhorn_iterations": 6},
    "decay, ascent": {"weight_decay": 0.1, "maximize": True},
    "cautious decay": {"weight_decay": 0.1, "cautious_decay": True},
    "split": {"split": 2},
    "transposed": {"layout": "transposed"},
    "iterations": {"sinkhorn_iterations": 3},
}
# Two values of one option are no pair, but these are.
OF_MOMENTUM = {("nesterov", "after"), ("nesterov", "8 bits"), ("after", "8 bits")}
PAIRS = {
    f"{one} + {other}": OPTIONS[one] | OPTIONS[other]
    for one, other in combinations(OPTIONS, 2)
    if all(
        OPTIONS[one][key] == OPTIONS[other][key] or (one, other) in OF_MOMENTUM
        for key in OPTIONS[one].keys() & OPTIONS[other].keys()
    )
}
# Pairs that are refused, and a part of the message.
REFUSED = {
    "first column + warm start": "warm_start=True",
    "table + warm start": "warm_start=True",
    **{f"{name} + cross-fit": "cross_fit=True" for name in ("momentum", "nesterov", "low rank")},
    "held + decay, ascent": "constant_norm=True",
    "held + cautious decay": "constant_norm=True",
}
MESHES = {
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(-1),)),
    "both": ((2, 2), (Shard(0), Shard(-1))),
}


def walk(options, mesh=None, placements=None, *, released=False):
    """Take steps; return the weights then, in the order of `SHAPES`."""
    params = [nn.Parameter(lying(normal(shape, 7), mesh, placements)) for shape in SHAPES]
    group = {"params": params, "algorithm": "sinkgd", "sinkhorn_iterations": 1, **options}
    optimizer = sinkgd.SinkGD([group], lr=0.125)
    release = sinkgd.GradientRelease(optimizer, averaged=True) if released else None
    for step in range(STEPS):
        if options.get("cross_fit"):
            with release.accumulate() if release else nullcontext():
                for i, param in enumerate(params):
                    descend(param, held_out(step, i), mesh, placements)
            optimizer.hold_out()
        for i, param in enumerate(params):
            descend(param, normal(SHAPES[i], 10 * step + i).pow(3), mesh, placements)
            assert (param.grad is None) == released
        optimizer.step()
        optimizer.zero_grad()
    if release:
        release.remove()
    return [param.detach() if mesh is None else param.detach().full_tensor() for param in params]


def held_out(step, i):
    return normal(SHAPES[i], 100 + 10 * step + i).pow(3)


def descend(param, whole_grad, mesh, placements):
    """Run a backward pass with this gradient."""
    grad = lying(whole_grad, mesh, placements)
    here, slope = (param, grad) if mesh is None else (param.to_local(), grad.to_local())
    (here * slope).sum().backward()


def lying(whole, mesh, placements):
    if mesh is None:
        return whole
    return distributed(whole, mesh, [Shard(place.dim % whole.ndim) for place in placements])


def error_or(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except ValueError as error:
        return str(error)


def walks_and_messages(kinds, table, ways):
    """Walk every entry of a table, lying in every way; and count what single options tell."""
    walks, told = {}, {}
    for kind in kinds:
        size, placements = MESHES[kind]
        mesh = init_device_mesh("cpu", size)
        for name, options in table.items():
            for released in ways:
                walks[kind, name, released] = error_or(
                    walk, options, mesh, placements, released=released
                )
        for name in MORE_MESSAGES:
            told[kind, name] = messages_of(OPTIONS[name], mesh, placements)
    return walks, told


@pytest.fixture(scope="module")
def on_two():
    """What every rank found."""
    return on_ranks(2, walks_and_messages, ["rows", "columns"], PAIRS, [False, True])


@pytest.fixture(scope="module")
def on_four():
    return on_ranks(4, walks_and_messages, ["both"], OPTIONS, [False])


@pytest.fixture(scope="module")
def whole():
    return {pair: error_or(walk, options) for pair, options in PAIRS.items()}


def test_the_table_is_complete():
    assert (len(OPTIONS), len(PAIRS)) == (24, 271)


@pytest.mark.parametrize("pair", PAIRS)
def test_released_it_is_the_ordinary_step_bit_for_bit(whole, pair):
    released = error_or(walk, PAIRS[pair], released=True)
    if isinstance(whole[pair], str):
        assert released == whole[pair]
        assert REFUSED[pair] in released
    else:
        assert all(torch.equal(a, b) for a, b in zip(released, whole[pair], strict=True))


IN_REFERENCE = [
    pair
    for pair, options in PAIRS.items()
    if pair not in REFUSED
    and not options.keys() & {"warm_start", "tol", "weight_decay", "split", "layout"}
]


@pytest.mark.parametrize("pair", IN_REFERENCE)
def test_whole_matrices_take_the_steps_of_both_formulas(whole, pair):
    options = {"sinkhorn_iterations": 1, **PAIRS[pair]}
    for i, (shape, weight) in enumerate(zip(SHAPES[:1], whole[pair], strict=False)):
        expected = Expected(normal(shape, 7), lr=0.125, **options)
        for step in range(STEPS):
            if options.get("cross_fit"):
                expected.hold_out(held_out(step, i))
            expected.step(normal(shape, 10 * step + i).pow(3))
        assert_close(weight.double(), expected.weight, rtol=1e-5, atol=1e-5)


def is_refused(kind, options):
    """Whether a warm start would keep scales of whole rows or columns, and those lie in pieces."""
    rows_last, turned = options.get("last") == "row", options.get("layout") == "transposed"
    cut = {"rows": "column", "columns": "row"}[kind]  # what is in pieces
    needed = "column" if rows_last != turned else "row"
    return "warm_start" in options and cut == needed


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_in_pieces_it_is_the_step_of_the_whole(on_two, whole, kind, pair):
    for walks, _ in on_two:
        weights, released = walks[kind, pair, False], walks[kind, pair, True]
        if isinstance(whole[pair], str) or is_refused(kind, PAIRS[pair]):
            assert weights == released
            assert REFUSED.get(pair, "warm_start=True") in weights
            continue
        for weight, expected in zip(weights, whole[pair], strict=True):
            assert_close(weight, expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(weights, released, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "warm start"])
def test_cut_both_ways_it_is_the_step_of_the_whole(on_four, name):
    expected = walk(OPTIONS[name])
    for walks, _ in on_four:
        for weight, whole in zip(walks["both", name, False], expected, strict=True):
            assert_close(weight, whole, rtol=1e-5, atol=1e-5)


# Messages -----------------------------------------------------------------------------------------

# Beyond one message a group and iteration: by options, over rows and over columns.
MORE_MESSAGES = {
    "momentum": (1, 1),
    "nesterov": (1, 1),
    "after": (0, 0),
    "8 bits": (0, 0),
    "low rank": (2, 2),
    "cross-fit": (2, 2),
    "averaged scales": (0, 1),
    "last row": (0, 0),
    "first column": (1, 1),
    "table": (1, 1),
    "mask": (1, 1),
    "deflated": (2, 4),
    "deflated, kept": (2, 4),
    "unit": (1, 2),
    "muon": (1, 2),
    "projected": (0, 1),
    "held": (1, 1),
}


def messages_of(options, mesh, placements):
    """Count what a step of twelve matrices tells other ranks, by mesh dimension."""
    params = [nn.Parameter(lying(normal((10, 6), i), mesh, placements)) for i in range(12)]
    group = {"params": params, "algorithm": "sinkgd", **options}
    optimizer = sinkgd.SinkGD([group], sinkhorn_iterations=3)
    for i, param in enumerate(params):
        param.grad = lying(normal((10, 6), 20 + i), mesh, placements)
    if options.get("cross_fit"):
        grads = [param.grad for param in params]
        optimizer.hold_out()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
    with Messages() as counted:
        optimizer.step()
    return counted.by_dim(mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_MESSAGES)
def test_messages_are_as_many_as_stated_and_nothing_is_gathered(on_two, on_four, name):
    by_rows, by_columns = MORE_MESSAGES[name]
    for _, told in on_two:
        assert told["rows", name] == {0: 3 + by_rows}
        assert told["columns", name] == {0: 3 + by_columns}
    for _, told in on_four:
        assert told["both", name] == {0: 3 + by_rows, 1: 3 + by_columns}
