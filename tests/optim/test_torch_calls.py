"""A step makes as many calls of torch whatever the number of layers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from sinkgd import kernels
from sinkgd.kernels.eager import EagerBackend
from sinkgd.kernels.two_halves import finite_of
from sinkgd.lab.plan import Grid, find_architecture
from sinkgd.lab.plan.weights import weights_of

# AdamW's own: for the step counts, the update, and what holds back a step of the counts.
ADAMW = {"aten._foreach_add_.Scalar", "aten._fused_adamw_.default", "aten._foreach_sub_.List"}


class OneCall(EagerBackend):
    """A backend of one call for all scales and one for all updates, as kernels in a table are."""

    def __init__(self):
        self.found = {}

    def scales(self, grads, num_iters, *, tol=None, starts=None):
        key = tuple(grad.data_ptr() for grad in grads)
        if key not in self.found:
            self.found[key] = super().scales(grads, num_iters, tol=tol, starts=starts)
        torch.empty(())
        return self.found[key]

    def update_(self, params, grads, scales, **options):
        torch.empty(())


class OneCallDeflated(OneCall):
    """The same with one call for the products of all updates, and one for their squares."""

    def products(self, stacks):
        key = "products", *(grad.data_ptr() for stack in stacks for grad in stack.grads)
        if key not in self.found:
            self.found[key] = Remembered(super().products(stacks))
        return self.found[key]


class Remembered:
    """Answers that are found once, each a call."""

    def __init__(self, products):
        self.products, self.found = products, {}

    def of_both(self, blocks):
        torch.empty(())
        number = self.calls = getattr(self, "calls", 0) % 2  # the first and the second of a step
        self.calls += 1
        if ("both", number) not in self.found:
            self.found["both", number] = self.products.of_both(blocks)
        rows, cols = self.found["both", number]
        return [*rows], [*cols]

    def squares(self):
        torch.empty(())
        if "squares" not in self.found:
            self.found["squares"] = self.products.squares()
        return [*self.found["squares"]]


class Calls(TorchDispatchMode):
    """Counts the calls of torch by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(params, monkeypatch, **options):
    """Count the calls of the second step, which makes no state."""
    backend = OneCallDeflated()
    monkeypatch.setattr(kernels, "select", lambda name, device: backend)
    groups = [
        {"params": [x for is_matrix, x in params if is_matrix], "algorithm": "sinkgd", **options},
        {"params": [x for is_matrix, x in params if not is_matrix], "algorithm": "adamw"},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = sinkgd.SinkGD(groups, lr=1e-3, nonfinite="skip")
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    return calls.counts


def tiny(model, layers=None):
    """Return the parameters of a model, matrices and others, of a few entries each."""
    architecture = find_architecture(model)
    if layers is not None:
        architecture = replace(architecture, num_layers=layers)
    weights = weights_of(architecture, Grid())
    return [
        (weight.is_matrix, nn.Parameter(torch.ones([2] * len(weight.shape)))) for weight in weights
    ]


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "stochastic"}, {"weight_decay": 0.1, "last": "row"}], ids=str
)
def test_calls_do_not_grow_with_the_model(monkeypatch, options):
    small, large = (
        calls_of_a_step(tiny("llama-1b", layers), monkeypatch, **options) for layers in (2, None)
    )
    views = {"aten.transpose.int"}  # of each matrix whose rows come last
    assert {k: v for k, v in small.items() if k not in views} == {
        k: v for k, v in large.items() if k not in views
    }
    assert sum(count for name, count in large.items() if name not in ADAMW | views) <= 60


def deflated_calls(shapes, monkeypatch):
    params = [(True, nn.Parameter(torch.ones(shape))) for shape in shapes]
    return calls_of_a_step(params, monkeypatch, deflated_rank=2).total()


def test_calls_of_deflation_do_not_grow_with_matrices_of_one_shape(monkeypatch):
    few, many = (deflated_calls([(5, 6), (6, 5)] * n, monkeypatch) for n in (2, 20))
    assert few == many


def test_factorizations_of_matrices_of_many_shapes_are_made_together(monkeypatch):
    params = [(True, nn.Parameter(torch.ones(5, 6 + i))) for i in range(20)]
    counts = calls_of_a_step(params, monkeypatch, deflated_rank=2)
    assert counts["aten.linalg_cholesky_ex.default"] == 2
    assert counts["aten.linalg_solve_triangular.default"] == 2
    few = deflated_calls([(5, 6 + i) for i in range(10)], monkeypatch)
    assert counts.total() - few <= 10 * 100  # 142 of each before


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
    with Calls() as calls:
        flags = EagerBackend().are_finite(tensors)
    assert flags.tolist() == [True] * 4 + [False]
    assert calls.counts["aten._foreach_norm.Scalar"] == 4  # one a dtype
