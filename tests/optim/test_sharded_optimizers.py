"""Every optimizer on a mesh: what one process would have done, and what ranks tell each other."""

import os
import re
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing import assert_close

import sinkgd
from reference import (
    column_projection,
    frobenius_projection,
    row_projection,
    sign_projection,
    square_root_sinkhorn,
)
from sinkgd.distributed.shards import placed_as
from sinkgd.optim.methods import METHODS, multi_normalized
from spawn import on_ranks
from test_sharded import Messages, distributed, expected_update, normal, sharded

FLOAT32 = {"rtol": 3e-6, "atol": 0}
ROWS, COLS, ALL = Shard(0), Shard(1), Replicate()
ON_TWO, ON_FOUR = {}, {}


def on_two(function):
    ON_TWO[function.__name__] = function
    return function


def on_four(function):
    ON_FOUR[function.__name__] = function
    return function


def run(names):
    return {name: {**ON_TWO, **ON_FOUR}[name]() for name in names}


@pytest.fixture(scope="module")
def found():
    """What each function returned on each of its ranks."""
    two, four = on_ranks(2, run, list(ON_TWO)), on_ranks(4, run, list(ON_FOUR))
    return {
        name: [of_rank[name] for of_rank in ranks] for ranks in (two, four) for name in ranks[0]
    }


def stepped(matrices, mesh, *, lr=0.125, **options):
    """Step matrices given as (placements, whole, gradient); return what the parameters are then."""
    params = [sharded(mesh, *matrix) for matrix in matrices]
    group = {"params": [(f"w{i}", param) for i, param in enumerate(params)], **options}
    sinkgd.SinkGD([group], lr=lr).step()
    return [param.detach().full_tensor() for param in params]


# Many matrices at once ----------------------------------------------------------------------------

# A layer of a transformer under FSDP and tensor parallelism: column-wise, row-wise, neither.
LAYER = [(48, 16), (16, 48), (16, 16), (7, 16)]
LAYER_PLACEMENTS = [(ROWS, ROWS), (ROWS, COLS), (ROWS, ALL), (ROWS, ALL)]


@on_four
def a_layer():
    mesh = init_device_mesh("cpu", (2, 2))
    shapes = LAYER * 3
    params = [
        sharded(mesh, placements, torch.zeros(shape), normal(shape, i))
        for i, (placements, shape) in enumerate(zip(LAYER_PLACEMENTS * 3, shapes, strict=True))
    ]
    optimizer = sinkgd.SinkGD([{"params": params, "algorithm": "sinkgd"}], lr=0.125)
    with Messages() as messages:
        optimizer.step()
    return messages.by_dim(mesh), [-param.detach().full_tensor() / 0.125 for param in params]


def test_matrices_of_all_placements_share_their_messages(found):
    for messages, updates in found["a_layer"]:
        assert messages == {0: 5, 1: 5}
        for i, update in enumerate(updates):
            assert_close(update.double(), expected_update(normal(update.shape, i)), **FLOAT32)


@on_four
def opposite_orders():
    mesh = init_device_mesh("cpu", (2, 2))
    params = [
        sharded(mesh, placements, torch.zeros(6, 8), normal((6, 8), i))
        for i, placements in enumerate([(ROWS, COLS), (COLS, ROWS)])
    ]
    with Messages() as messages:
        sinkgd.SinkGD(params, lr=0.125).step()
    return messages.by_dim(mesh), [-param.detach().full_tensor() / 0.125 for param in params]


def test_where_no_order_suits_all_there_is_one_message_more(found):
    for messages, updates in found["opposite_orders"]:
        assert sorted(messages.values()) == [5, 6]
        for i, update in enumerate(updates):
            assert_close(update.double(), expected_update(normal((6, 8), i)), **FLOAT32)


@on_four
def several_meshes():
    wide, deep = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    params = [
        sharded(wide, (ROWS,), torch.zeros(9, 8), normal((9, 8), 0)),
        sharded(deep, (ALL, COLS), torch.zeros(9, 8), normal((9, 8), 1)),
        nn.Parameter(torch.zeros(9, 8)),
    ]
    params[2].grad = normal((9, 8), 2)
    sinkgd.SinkGD(params, lr=0.125).step()
    return [
        -(param.full_tensor() if isinstance(param, DTensor) else param).detach() / 0.125
        for param in params
    ]


def test_one_optimizer_takes_parameters_of_several_meshes(found):
    for updates in found["several_meshes"]:
        for i, update in enumerate(updates):
            assert_close(update.double(), expected_update(normal((9, 8), i)), **FLOAT32)


# Many groups at once ------------------------------------------------------------------------------

# Each group alone needs so many messages of the mesh's one group, which shards rows.
GROUPS = {
    "deflated": ({"algorithm": "sinkgd", "deflated_rank": 2}, 5 + 2),
    "deflated, another rate": ({"algorithm": "sinkgd", "deflated_rank": 2, "lr": 0.3}, 5 + 2),
    "momentum": ({"algorithm": "sinkgd", "momentum": 0.9, "nesterov": True}, 1 + 5),
    "tempered": ({"algorithm": "tempered"}, 1 + 5 + 1),
    "vectors": ({"algorithm": "normalize"}, 1 + 1),
    "adamw": ({"algorithm": "adamw"}, 1),
    "adamw, bad": ({"algorithm": "adamw", "weight_decay": 0.1}, 1),
}


def hybrid(mesh, names):
    """Step groups by one optimizer; return messages, parameters, and what was skipped."""
    groups = []
    for i, name in enumerate(GROUPS):
        shapes = [(9,), (7,)] if name == "vectors" else [(9, 8), (1, 6), (7, 6)]
        params = [
            sharded(mesh, (ROWS,), normal(shape, 10 * i + k), normal(shape, 90 + 10 * i + k))
            for k, shape in enumerate(shapes)
        ]
        if name == "adamw, bad" and mesh.get_rank() == 1:
            params[0].grad.to_local()[1, 2] = torch.nan
        groups.append({"params": [(f"{name} {k}", w) for k, w in enumerate(params)]})
        groups[-1].update(GROUPS[name][0])
    chosen = [group for name, group in zip(GROUPS, groups, strict=True) if name in names]
    chosen.append({"params": [("without gradient", nn.Parameter(torch.ones(2, 2)))]})
    optimizer = sinkgd.SinkGD(chosen, lr=0.1, nonfinite="skip")
    with Messages() as messages:
        optimizer.step()
    weights = {
        name: param.detach().full_tensor()
        for group in chosen[:-1]
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    return messages.by_dim(mesh), weights, optimizer.skipped()


@on_two
def groups_together_and_alone():
    mesh = init_device_mesh("cpu", (2,))
    return hybrid(mesh, list(GROUPS)), [hybrid(mesh, [name]) for name in GROUPS]


def test_all_groups_of_a_step_share_their_messages(found):
    for (messages, weights, skipped), alone in found["groups_together_and_alone"]:
        assert [own[0].get(0) for own in alone] == [count for _, count in GROUPS.values()]
        assert messages == {0: max(count for _, count in GROUPS.values())}  # not 31
        for _, own, _ in alone:
            assert all(torch.equal(weights[name], x) for name, x in own.items())
        assert skipped == {"adamw, bad 0": 1}


# Triton's kernels for pieces ----------------------------------------------------------------------


@on_two
def with_triton():
    """The update of matrices that lie by rows and by columns, in triton's interpreter."""
    found = []
    if find_spec("triton") is None:
        return found
    os.environ["TRITON_INTERPRET"] = "1"  # before this rank imports the kernels
    mesh = init_device_mesh("cpu", (2,))
    for placements, dtype in [((ROWS,), torch.float32), ((COLS,), torch.bfloat16)]:
        grads = [normal(shape, i).to(dtype) for i, shape in enumerate([(9, 16), (3, 70)])]
        matrices = [(placements, torch.zeros_like(x), x) for x in grads]
        updates = stepped(matrices, mesh, backend="triton", algorithm="sinkgd")
        found.append([(-x.float() / 0.125, grad) for x, grad in zip(updates, grads, strict=True)])
    return found


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, and its interpreter")
def test_the_kernels_of_triton_take_pieces(found):
    for by_rows, by_columns in found["with_triton"]:
        for update, grad in by_rows:
            assert_close(update.double(), expected_update(grad), **FLOAT32)
        for update, grad in by_columns:  # rounded to bfloat16
            assert_close(update.double(), expected_update(grad), rtol=2**-8, atol=0)


# Any gradient -------------------------------------------------------------------------------------


def odd_gradients():
    plain = normal((12, 10), 5)
    rows = plain * torch.logspace(-20, 15, 12)[:, None]
    columns = plain * torch.logspace(-15, 18, 10)
    holes = plain.clone()
    holes[[0, 5, 7]] = 0
    holes[:, [1, 8, 9]] = 0
    half = plain.clone()
    half[6:] = 0  # all of what the second rank holds
    return {
        "tiny": 1e-30 * plain,
        "huge": 1e30 * plain,
        "rows": rows,
        "columns": columns,
        "holes": holes,
        "half": half,
        "zero": torch.zeros(12, 10),
        "one": torch.eye(12, 10) * (torch.arange(12) == 3)[:, None],
        "bfloat16": plain.bfloat16(),
        "float64": plain.double(),
    }


ITERATIONS = (1, 2, 5, 40)


def updates_of_odd_gradients(mesh, placements):
    return {
        (name, iterations): -stepped(
            [(placements, torch.zeros_like(grad), grad)], mesh, sinkhorn_iterations=iterations
        )[0]
        / 0.125
        for name, grad in odd_gradients().items()
        for iterations in ITERATIONS
    }


@on_two
def odd_gradients_by_rows():
    return updates_of_odd_gradients(init_device_mesh("cpu", (2,)), (ROWS,))


@on_two
def odd_gradients_by_columns():
    return updates_of_odd_gradients(init_device_mesh("cpu", (2,)), (COLS,))


@on_four
def odd_gradients_by_both():
    return updates_of_odd_gradients(init_device_mesh("cpu", (2, 2)), (ROWS, COLS))


@pytest.mark.parametrize("how", ["rows", "columns", "both"])
@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("name", list(odd_gradients()))
def test_size_and_zeros_do_not_matter(found, how, iterations, name):
    grad = odd_gradients()[name]
    tolerance = {"rtol": 2**-8, "atol": 0} if name == "bfloat16" else FLOAT32
    expected = square_root_sinkhorn(grad, iterations)
    for updates in found[f"odd_gradients_by_{how}"]:
        assert_close(updates[name, iterations].double(), expected, **tolerance)


# Not finite ---------------------------------------------------------------------------------------


def bad_steps(mesh, placements, shape=(6, 8)):
    """One bad entry in the second of three matrices, wherever it is: what happened."""
    outcomes = []
    for bad in (float("nan"), float("inf")):
        for place in ((0, 0), (5, 7), (2, 7)):
            for iterations in (1, 5):
                grads = [normal(shape, i) for i in range(3)]
                grads[1][..., place[0], place[1]] = bad
                params = [sharded(mesh, placements, torch.ones(shape), grad) for grad in grads]
                named = [(f"w{i}", param) for i, param in enumerate(params)]
                optimizer = sinkgd.SinkGD(named, sinkhorn_iterations=iterations)
                try:
                    optimizer.step()
                    said = "nothing"
                except sinkgd.NonFiniteGradientError as error:
                    said = str(error)
                stayed = [bool((param.detach().full_tensor() == 1).all()) for param in params]
                outcomes.append((said, stayed))
    return outcomes


@on_two
def bad_by_rows():
    return bad_steps(init_device_mesh("cpu", (2,)), (ROWS,))


@on_two
def bad_by_columns():
    return bad_steps(init_device_mesh("cpu", (2,)), (COLS,))


@on_two
def bad_by_experts():
    return bad_steps(init_device_mesh("cpu", (2,)), (ROWS,), (2, 6, 8))


@on_four
def bad_by_both():
    return bad_steps(init_device_mesh("cpu", (2, 2)), (ROWS, COLS))


@on_four
def bad_in_an_empty_piece():
    return bad_steps(init_device_mesh("cpu", (4,)), (ROWS,), (3, 6, 8))


@pytest.mark.parametrize(
    "how", ["by_rows", "by_columns", "by_experts", "by_both", "in_an_empty_piece"]
)
def test_every_rank_hears_of_a_bad_entry_and_leaves_that_parameter_alone(found, how):
    for outcomes in found[f"bad_{how}"]:
        for said, stayed in outcomes:
            assert "gradient of w1 holds" in said
            assert stayed == [False, True, False]


# Options ------------------------------------------------------------------------------------------


def grads_of_a_walk(shape, steps=3):
    return [normal(shape, 10 + i) for i in range(steps)]


def walk(mesh, placements, shape=(10, 6), dtype=torch.float32, **options):
    """Take some steps; return the parameter."""
    whole = normal(shape).to(dtype)
    param = nn.Parameter(whole if mesh is None else distributed(whole, mesh, placements))
    optimizer = sinkgd.SinkGD([{"params": [("w", param)], **options}], lr=0.125)
    for grad in grads_of_a_walk(shape):
        own = grad.to(dtype)
        param.grad = own if mesh is None else distributed(own, mesh, placements)
        optimizer.step()
    found = param.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


# Something is cut, and the third step is the first after a reset.
YOUNG = {"reset_interval": 2, "warmup_steps": 2, "theta": 2.0, "clip_delay": 1}

WALKS = {
    "decay": {"algorithm": "sinkgd", "weight_decay": 0.5},
    "maximize": {"algorithm": "sinkgd", "maximize": True},
    "tol": {"algorithm": "sinkgd", "sinkhorn_iterations": 60, "tol": 1e-3},
    "warm start": {"algorithm": "sinkgd", "warm_start": True, "sinkhorn_iterations": 2},
    "split": {"algorithm": "sinkgd", "split": (3, 1, 6)},
    "transposed": {"algorithm": "sinkgd", "layout": "transposed"},
    "normalize": {"algorithm": "normalize"},
    "adamw": {"algorithm": "adamw", "weight_decay": 0.1},
    "tempered": {"algorithm": "tempered", "weight_decay": 0.1},
    "tempered split": {"algorithm": "tempered", "split": (3, 1, 6)},
    "tempered transposed": {"algorithm": "tempered", "layout": "transposed"},
    "tempered at once": {"algorithm": "tempered", "n_iter": 0},
    "spam": {"algorithm": "spam", "weight_decay": 0.1, **YOUNG},
    "adamw-spam": {"algorithm": "adamw-spam", "weight_decay": 0.1, **YOUNG},
}


@on_two
def walks_by_rows():
    mesh = init_device_mesh("cpu", (2,))
    return {name: walk(mesh, (ROWS,), **options) for name, options in WALKS.items()}


@on_two
def walks_by_columns():
    mesh = init_device_mesh("cpu", (2,))
    return {
        name: walk(mesh, (COLS,), **options)
        for name, options in WALKS.items()
        if name != "warm start"
    }


@pytest.mark.parametrize("how", ["rows", "columns"])
@pytest.mark.parametrize("name", WALKS)
def test_options_mean_what_they_mean_to_one_process(found, how, name):
    if (how, name) == ("columns", "warm start"):
        pytest.skip("refused; see below")
    expected = walk(None, None, **WALKS[name])
    for walked in found[f"walks_by_{how}"]:
        assert_close(walked[name], expected, rtol=1e-5, atol=1e-6)


def spiking_walk(mesh, placements, spike_z):
    """Let the norm spike in the last but one of 14 steps; return the parameter and its norms."""
    whole = normal((10, 6))
    param = nn.Parameter(whole if mesh is None else distributed(whole, mesh, placements))
    optimizer = sinkgd.AdamWSPAM([("w", param)], lr=0.125, spike_z=spike_z)
    for step in range(14):
        grad = normal((10, 6), 10 + step) * (10 if step == 12 else 1)
        param.grad = grad if mesh is None else distributed(grad, mesh, placements)
        optimizer.step()
    found = param.detach()
    norms = optimizer.param_groups[0]["norm_history"]
    return found.full_tensor() if isinstance(found, DTensor) else found, norms


@on_two
def spikes():
    mesh = init_device_mesh("cpu", (2,))
    return [spiking_walk(mesh, placements, 3.0) for placements in ((ROWS,), (COLS,), (ALL,))]


def test_ranks_agree_on_the_norm_of_all_pieces_and_on_its_spikes(found):
    expected, norms = spiking_walk(None, None, 3.0)
    unmoved, _ = spiking_walk(None, None, torch.inf)
    assert not torch.allclose(expected, unmoved, rtol=1e-3, atol=1e-3)
    for walks in found["spikes"]:
        for param, own_norms in walks:
            assert_close(param, expected, rtol=1e-5, atol=1e-6)
            assert_close(own_norms, norms, rtol=1e-6, atol=0, equal_nan=True)


ROUNDED = ("sinkgd", "adamw")
AT_RANDOM = {"rounding": "stochastic", "seed": 3}


@on_two
def rounded_at_random():
    mesh = init_device_mesh("cpu", (2,))
    return {
        algorithm: [
            walk(mesh, placements, shape, torch.bfloat16, algorithm=algorithm, **AT_RANDOM)
            for placements, shape in (((ROWS,), (11, 6)), ((COLS,), (11, 6)))
        ]
        for algorithm in ROUNDED
    }


@pytest.mark.parametrize("algorithm", ROUNDED)
def test_random_rounding_by_rows_draws_the_bits_of_one_process(found, algorithm):
    expected = walk(None, None, (11, 6), torch.bfloat16, algorithm=algorithm, **AT_RANDOM)
    for of_algorithm in found["rounded_at_random"]:
        by_rows, by_columns = of_algorithm[algorithm]
        # Sums in another order move an update by a few units of float32, a random bit seldom.
        assert (by_rows != expected).sum() <= (1 if algorithm == "sinkgd" else 0)
        assert_close(by_columns, expected, rtol=2**-6, atol=2**-6)


SHAPES_ON_TWO = {
    "by rows": (ROWS, (64, 64)),
    "by columns": (COLS, (64, 64)),
    "vector": (ROWS, 4096),
}
# Whitening needs whole matrices, matrix norms update no vectors, and SAGE averages over rows.
NOT_ON_TWO = {
    *(("swan", name) for name in SHAPES_ON_TWO),
    *((method, "vector") for method in ("sinkgd", "mngd", "sinkgd-table", "sage")),
    ("sage", "by columns"),
}


@on_two
def pieces_that_look_alike():
    """Two ranks hold equal numbers; the bits that round them must differ."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for algorithm, method in METHODS.items():
        if "rounding" not in method.options:
            continue
        for name, (placement, shape) in SHAPES_ON_TWO.items():
            ones = torch.ones(shape).bfloat16()
            param = sharded(mesh, (placement,), ones, ones)
            group = {"params": [param], "algorithm": algorithm, "rounding": "stochastic"}
            if algorithm == "mngd":
                group["norms"] = [sinkgd.RowNorm(), sinkgd.ColumnNorm()]
            try:
                sinkgd.SinkGD([group], lr=2.0**-10).step()
            except (TypeError, ValueError):
                found[algorithm, name] = None
                continue
            pieces = [torch.empty_like(param.to_local()) for _ in range(2)]
            dist.all_gather(pieces, param.detach().to_local().contiguous())
            found[algorithm, name] = pieces
    return found


def test_pieces_are_not_rounded_alike(found):
    for pieces in found["pieces_that_look_alike"]:
        assert {key for key, value in pieces.items() if value is None} == NOT_ON_TWO
        for key, value in pieces.items():
            assert value is None or not torch.equal(*value), key


@on_two
def adamw_with_a_bad_piece():
    mesh = init_device_mesh("cpu", (2,))
    grad = normal((6, 8))
    grad[5, 7] = torch.nan
    param = sharded(mesh, (ROWS,), torch.ones(6, 8), grad)
    optimizer = sinkgd.SinkGD(
        [{"params": [("table", param)], "algorithm": "adamw"}], nonfinite="skip"
    )
    with Messages() as messages:
        optimizer.step()
    return (param.detach().full_tensor() == 1).all(), optimizer.skipped(), messages.by_dim(mesh)


def test_adamw_is_held_back_on_every_rank(found):
    for stayed, skipped, messages in found["adamw_with_a_bad_piece"]:
        assert stayed
        assert skipped == {"table": 1}
        assert messages == {0: 1}


# Several norms ------------------------------------------------------------------------------------

PROJECTIONS = {
    "row": (sinkgd.RowNorm(), row_projection),
    "column": (sinkgd.ColumnNorm(), column_projection),
    "frobenius": (sinkgd.FrobeniusNorm(), frobenius_projection),
    "sign": (sinkgd.SignNorm(), sign_projection),
}


def test_every_norm_that_takes_shards_is_among_them():
    found = {type(norm) for norm, _ in PROJECTIONS.values()}
    assert found == {*multi_normalized._SCALING_NORMS}
    assert PROJECTIONS.keys() <= {*TURNS}
    assert {*TURNS} == TURN_MESSAGES.keys()


TURNS = ["row", "column", "frobenius", "sign", "row column", "sign row", "column frobenius"]
# Messages over rows and over columns, of two rounds, and one that tells what is not finite.
TURN_MESSAGES = {
    "row": (1, 3),
    "column": (3, 1),
    "frobenius": (3, 3),
    "sign": (1, 1),
    "row column": (3, 3),
    "sign row": (1, 3),
    "column frobenius": (5, 3),
}


def updates_of_turns(mesh, placements):
    found = {}
    for turns in TURNS:
        norms = [PROJECTIONS[name][0] for name in turns.split()]
        for name in ("tiny", "huge", "holes", "half", "zero", "bfloat16"):
            grad = odd_gradients()[name]
            param = sharded(mesh, placements, torch.zeros_like(grad), grad)
            with Messages() as messages:
                sinkgd.MNGD([param], 0.125, norms, 2).step()
            update = -param.detach().full_tensor() / 0.125
            found[turns, name] = update, [name for name, _ in messages.counts.elements()]
    return found


@on_two
def turns_by_rows():
    return updates_of_turns(init_device_mesh("cpu", (2,)), (ROWS,))


@on_two
def turns_by_columns():
    return updates_of_turns(init_device_mesh("cpu", (2,)), (COLS,))


@on_four
def turns_by_both():
    return updates_of_turns(init_device_mesh("cpu", (2, 2)), (ROWS, COLS))


@pytest.mark.parametrize("how", ["rows", "columns", "both"])
@pytest.mark.parametrize("turns", TURNS)
def test_norms_that_scale_take_their_turns_in_pieces(found, how, turns):
    sum_over_rows, sum_over_columns = TURN_MESSAGES[turns]
    told = {
        "rows": sum_over_rows,
        "columns": sum_over_columns,
        "both": sum_over_rows + sum_over_columns,
    }
    for updates in found[f"turns_by_{how}"]:
        for (own, name), (update, messages) in updates.items():
            if own != turns:
                continue
            expected = odd_gradients()[name]
            for projection in turns.split() * 2:
                expected = PROJECTIONS[projection][1](expected)
            tolerance = {"rtol": 2**-8, "atol": 0} if name == "bfloat16" else FLOAT32
            assert_close(update.double(), expected.double(), **tolerance)
            assert len(messages) == told[how]
            assert all("allreduce_" in message for message in messages)


def scale_walk(lying):
    """Three steps of SCALE: a hidden matrix, a table, and a head with momentum."""
    params = [nn.Parameter(lying(normal(shape, 9))) for shape in ((8, 6), (11, 6), (11, 6))]
    groups = [
        {"params": [("hidden", params[0])]},
        {"params": [("table", params[1])], "layout": "transposed"},
        {"params": [("head", params[2])], "momentum": 0.9},
    ]
    optimizer = sinkgd.SCALE(groups, lr=0.125)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = lying(normal(param.shape, 3 * step + i))
        optimizer.step()
    return [param.detach() for param in params]


@on_two
def scale_by_rows_and_columns():
    mesh = init_device_mesh("cpu", (2,))
    return [
        [param.full_tensor() for param in scale_walk(lambda x, p=p: distributed(x, mesh, (p,)))]
        for p in (ROWS, COLS)
    ]


def test_scale_takes_the_steps_of_one_process(found):
    expected = scale_walk(lambda whole: whole)
    for ways in found["scale_by_rows_and_columns"]:
        for walked in ways:
            for weight, whole in zip(walked, expected, strict=True):
                assert_close(weight, whole, rtol=1e-5, atol=1e-6)


@on_two
def bad_piece_of_a_norm():
    mesh = init_device_mesh("cpu", (2,))
    grad = normal((6, 8))
    grad[5, 7] = torch.nan
    param = sharded(mesh, (ROWS,), torch.ones(6, 8), grad)
    optimizer = sinkgd.SRON([("w", param)], nonfinite="skip", momentum=0.9)
    optimizer.step()
    kept = optimizer.state[param]["momentum_buffer"].full_tensor()
    return bool((param.detach().full_tensor() == 1).all()), bool(kept.eq(0).all())


def test_a_bad_piece_holds_back_the_weight_and_the_average_on_every_rank(found):
    assert found["bad_piece_of_a_norm"] == [(True, True)] * 2


# What is refused ----------------------------------------------------------------------------------


def error_of(build):
    try:
        build()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Gradients with other placements than their parameters --------------------------------------------

# Methods that update a matrix on any mesh, and others that update a whole one on every rank.
SHARDED = ["sinkgd", "adamw", "normalize", "spam"]
PLACEMENTS = [ROWS, COLS, ALL]


def spread_gradient(whole, mesh, placement):
    """Return a DTensor of these values; those of a pending sum are on the first rank alone."""
    if not isinstance(placement, Partial):
        return distributed(whole, mesh, (placement,))
    here = whole.clone() if mesh.get_local_rank() == 0 else torch.zeros_like(whole)
    return DTensor.from_local(here, mesh, [placement])


def two_steps(algorithm, mesh=None, of_param=None, of_grad=None):
    """Return a parameter after two steps; without a mesh, of a plain tensor."""
    start = normal((6, 4), 9)
    param = nn.Parameter(start.clone() if mesh is None else distributed(start, mesh, (of_param,)))
    optimizer = sinkgd.SinkGD([{"params": [("w", param)], "algorithm": algorithm}], lr=0.125)
    for seed in range(2):
        grad = normal((6, 4), seed)
        param.grad = grad if mesh is None else spread_gradient(grad, mesh, of_grad)
        optimizer.step()
    return param.detach() if mesh is None else param.detach().full_tensor()


@on_two
def other_placements():
    mesh = init_device_mesh("cpu", (2,))
    cases = [
        (algorithm, of_param, of_grad)
        for algorithm in [*SHARDED, "swan"]
        for of_param in (PLACEMENTS if algorithm != "swan" else [ALL])
        for of_grad in [*PLACEMENTS, Partial()]
    ]
    return [(case, two_steps(case[0], mesh, *case[1:])) for case in cases]


def test_a_gradient_may_have_other_placements_than_its_parameter(found):
    for rank in found["other_placements"]:
        assert len(rank) == 4 * 3 * 4 + 4
        for (algorithm, *placements), param in rank:
            expected = two_steps(algorithm)
            assert_close(param, expected, rtol=1e-5, atol=1e-6, msg=f"{algorithm} {placements}")


@on_two
def refusals():
    mesh = init_device_mesh("cpu", (2,))

    def a_pending_sum_at_a_rate_of_zero():  # as in the first step of a warmup
        param = sharded(mesh, (ALL,), torch.ones(4, 4), torch.ones(4, 4))
        param.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
        sinkgd.SinkGD([("w", param)], lr=0.0).step()

    def with_a_gradient_on_another_mesh():
        param = sharded(mesh, (ROWS,), torch.ones(4, 4), torch.ones(4, 4))
        other = init_device_mesh("cpu", (2, 1))
        placed_as(param, distributed(torch.ones(4, 4), other, (ROWS, ALL)), "w")

    def with_a_plain_gradient():
        placed_as(sharded(mesh, (ROWS,), torch.ones(4, 4), torch.ones(4, 4)), torch.ones(2, 4), "w")

    def in_flat_pieces():
        flat = nn.Parameter(torch.ones(8))
        _set_fsdp_flattened(flat)  # as FullyShardedDataParallel does, which needs an accelerator
        sinkgd.SinkGD([("w", flat)])

    def with_zero():
        param = nn.Parameter(torch.empty(0))
        param.ds_id = 7
        sinkgd.SinkGD([("w", param)])

    def swan():
        param = sharded(mesh, (ROWS,), torch.ones(4, 4), torch.ones(4, 4))
        sinkgd.SWAN([("w", param)], lr=0.1)

    def warm_start_by_columns():
        param = sharded(mesh, (COLS,), torch.ones(4, 4), torch.ones(4, 4))
        sinkgd.SinkGD([{"params": [("w", param)], "warm_start": True}])

    return {
        build.__name__: error_of(build)
        for build in (
            a_pending_sum_at_a_rate_of_zero,
            with_a_gradient_on_another_mesh,
            with_a_plain_gradient,
            in_flat_pieces,
            with_zero,
            swan,
            warm_start_by_columns,
        )
    }


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a_pending_sum_at_a_rate_of_zero", "nothing"),
        ("with_a_gradient_on_another_mesh", "TypeError: 'w' is on .* one mesh"),
        ("with_a_plain_gradient", "TypeError: 'w' is a DTensor, but its gradient is a Tensor"),
        ("in_flat_pieces", "TypeError: 'w' was flattened by .*FSDP2"),
        ("with_zero", "TypeError: 'w' was flattened by .*FSDP2"),
        ("swan", "TypeError: 'w' is sharded .*algorithm='sinkgd'"),
        ("warm_start_by_columns", "ValueError: .*warm_start.*'w'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(found, what, said):
    for errors in found["refusals"]:
        assert re.match(said, errors[what], re.DOTALL)
