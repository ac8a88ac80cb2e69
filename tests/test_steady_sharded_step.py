"""A steady step on a mesh copies nothing to the device and waits for nothing.

The device is torch's ``meta``: it runs every call without values, refuses to read one, and a copy
from the host to it is a call that can be counted.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sinkgd.exchange import run
from sinkgd.kernels import Matrices, Scales
from sinkgd.kernels.eager import EagerBackend
from sinkgd.optim.algorithms.deflated import _deflate_stacks
from sinkgd.optim.algorithms.half_steps import starts_after_half_step
from sinkgd.optim.algorithms.operator_norm import pin
from sinkgd.optim.algorithms.parts import Part
from sinkgd.optim.algorithms.tiny_rows import without_tiny_rows
from sinkgd.sharded import OnMesh, Place, agree, scales, spread_of, temper_piece

ROWS = Place(16, 6, (), ("shard",), ())  # a rank holds 8 rows
COLS = Place(8, 12, ("tp",), (), ())
BOTH = Place(16, 12, ("tp",), ("shard",), ("experts",))
PLACES = [ROWS, COLS, BOTH, ROWS, BOTH]
BACKEND = EagerBackend()


class Traffic(TorchDispatchMode):
    """Counts copies from the host to the device, and all calls."""

    def __init__(self):
        super().__init__()
        self.copies, self.calls = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        given = [x for x in [*args, *(kwargs or {}).values()] if isinstance(x, torch.Tensor)]
        found = func(*args, **(kwargs or {}))
        copies = func in {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
        if copies and found.is_meta and any(not x.is_meta for x in given):
            self.copies[str(func)] += 1
        return found


def matrices():
    """As many gradients and parameters as there are places."""
    grads = [torch.empty(8, 6, dtype=torch.bfloat16, device="meta") for _ in PLACES]
    return Matrices([torch.empty_like(x) for x in grads], grads, [range(2), range(2, 5)])


def parts():
    own = matrices()
    return [Part(w, g, 0, at) for w, g, at in zip(own.params, own.grads, PLACES, strict=True)]


def ones(shape):
    return torch.ones(shape, device="meta")


def found_scales():
    return [Scales(ones((8, 1)), ones((1, 6))) for _ in PLACES]


def plain():
    return OnMesh(BACKEND, PLACES).descend_(matrices(), 3, keep=1.0, step=-0.1)


def with_lr_on_the_device():
    lr = ones(())
    return OnMesh(BACKEND, PLACES).descend_(matrices(), 3, keep=1 - lr, step=-lr, overflow=lr != 1)


def deflated():
    blocks = [ones((6, 3)).double() for _ in PLACES]
    return _deflate_stacks(parts(), found_scales(), blocks, BACKEND)


def pinned():
    group = {"last": "column", "operator_norm": "muon"}
    return pin(parts(), found_scales(), [ones((1, 6)) for _ in PLACES], group)


def tempered():
    grad = torch.empty(8, 6, dtype=torch.bfloat16, device="meta")
    return temper_piece(grad, spread_of(BOTH), 0.1, 3, eps=1e-8)


STEPS = {
    "plain": plain,
    "with_lr_on_the_device": with_lr_on_the_device,
    "half_step": lambda: starts_after_half_step(parts(), BACKEND),
    "tiny_rows": lambda: without_tiny_rows(parts(), 0.1, BACKEND, in_place=False),
    "deflated": deflated,
    "pinned": pinned,
    "tempered": tempered,
    "flags": lambda: agree(ones(3) == 1, [("a",), (), ("a", "b")]),
}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda message, group: None)
    for cache in (scales._owners, scales._repeated):
        cache.cache_clear()


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_copied_to_the_device_or_waited_for(name):
    run(STEPS[name]())
    with Traffic() as traffic:
        run(STEPS[name]())
    assert not traffic.copies


def test_the_first_step_alone_copies_what_is_kept():
    with Traffic() as traffic:
        run(plain())
    assert traffic.copies.total() == 9  # whose rows and columns are whose, and how many; shared


def test_a_tolerance_is_waited_for():
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        run(OnMesh(BACKEND, PLACES).solve(matrices(), 3, tol=0.1))
