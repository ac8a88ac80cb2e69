"""A step makes as many calls of torch whatever the number of layers.

The backend is ``triton``, whose launches are replaced by nothing.
"""

import pytest
import torch

from sinkgd.kernels.backend import finite_of
from sinkgd.kernels.eager import EagerBackend
from sinkgd.lab.bench.gpu.recorded import (
    TorchCalls,
    calls_of_matrices,
    calls_of_model,
    calls_per_further_matrix,
    without_adamw,
)

pytestmark = pytest.mark.usefixtures("triton")


@pytest.fixture(scope="module")
def triton():
    pytest.importorskip("triton")


PLAIN = {"deflated_rank": 0}
VIEWS = ("aten.transpose.int",)  # of each matrix whose rows come last


def test_calls_of_a_plain_step_do_not_grow_with_the_matrices():
    assert calls_per_further_matrix(**PLAIN) == 0


def test_calls_of_a_deflated_step_hardly_grow_with_the_matrices():
    assert calls_per_further_matrix(deflated_rank=15) <= 0.2


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, ()),
        ({"rounding": "stochastic"}, ()),
        ({"weight_decay": 0.1, "last": "row"}, VIEWS),
    ],
    ids=str,
)
def test_calls_of_a_hybrid_step_of_a_whole_model_are_few(options, views):
    counts = calls_of_model("llama-1b", **PLAIN, **options)
    for view in views:
        del counts[view]
    assert without_adamw(counts) <= 60


def test_factorizations_of_matrices_of_many_shapes_are_made_together():
    few, many = (
        calls_of_matrices([(32, 48 + i) for i in range(count)], deflated_rank=2)
        for count in (2, 12)
    )
    for name in ("aten.linalg_cholesky_ex.default", "aten.linalg_solve_triangular.default"):
        assert few[name] == many[name] == 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_flags_of_owners_of_several_matrices(bad):
    grads = [torch.ones(3, 2, 4), torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)]
    owners = [range(1), range(1, 3), range(3, 4)]
    for i, place in enumerate([0, 1, 1, 2]):
        own = [grad.clone() for grad in grads]
        own[i].view(-1)[-1] = bad
        flags = finite_of(EagerBackend().scales(own, 2), owners)
        assert flags.tolist() == [k != place for k in range(3)]


def test_finite_gradients_of_many_dtypes_are_checked_together():
    tensors = [
        torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    ]
    tensors[4][1] = torch.nan
    with TorchCalls() as calls:
        flags = EagerBackend().are_finite(tensors)
    assert flags.tolist() == [True] * 4 + [False]
    assert calls.counts["aten._foreach_norm.Scalar"] == 4  # one a dtype
