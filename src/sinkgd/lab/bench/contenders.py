"""The table of optimizers that a step is timed and weighed with.

A pass is one reading or one writing of all the matrices. A floor is the passes that an optimizer
cannot do without: AdamW reads G, W, m, v and writes W, m, v; SGD reads G, W and writes W; SinkGD
with L iterations reads G L times, then G and W, and writes W; deflated it reads G twice more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

import sinkgd
from sinkgd import kernels
from sinkgd.lab.bench.problem import Problem
from sinkgd.lab.bench.public_loops import (
    PublicSinkGD,
    compiled_update,
    compiler_missing,
    naive_update,
)
from sinkgd.lab.bench.workloads import Workload
from sinkgd.optim.param_groups import DEFLATED_RANK

ADAMW = "adamw-fused"  # what the others are compared with
ITERATIONS = (5, 1)  # L of our rows; the public loops run the first
LR = 1e-3
_ADAMW_PASSES, _SGD_PASSES, _DEFLATION_PASSES = 7, 3, 2


@dataclass(frozen=True)
class Contender:
    """An optimizer, and what must be known before it runs."""

    name: str
    title: str  # for people
    build: Callable[[Problem], Optimizer]
    copies: int = 0  # what it allocates besides parameters and gradients, in sizes of them all
    floor_bytes: Callable[[Problem], int] | None = None  # that its step must move at least
    streams: bool = False  # does nothing but move its floor, so that it is a measure of bandwidth
    slow: bool = False  # takes many times as long as AdamW
    absent: Callable[[], str | None] = lambda: None  # why it cannot run, where it cannot


def contenders(workload: Workload, device: torch.device) -> list[Contender]:
    """Return all that update a workload, AdamW first, those that cannot run here included."""
    if workload.model is not None:
        return [_adamw_fused(), _adamw_foreach(), *_hybrids(device)]
    iterations = ITERATIONS[0]
    return [
        _adamw_fused(),
        _adamw_foreach(),
        Contender(
            "sgd-fused",
            "SGD fused",
            lambda p: torch.optim.SGD(p.params, lr=LR, fused=True),
            floor_bytes=_passes(_SGD_PASSES),
            streams=True,
        ),
        Contender(
            "muon",
            "Muon",
            lambda p: torch.optim.Muon(p.params, lr=LR, adjust_lr_fn="match_rms_adamw"),
            copies=1,
            slow=True,
            absent=lambda: None if hasattr(torch.optim, "Muon") else "this torch has no Muon",
        ),
        Contender(
            "naive-loop",
            "public loop",
            lambda p: PublicSinkGD(p.params, naive_update(iterations), LR),
            slow=True,
        ),
        Contender(
            "compiled-loop",
            "public, compiled",
            lambda p: PublicSinkGD(p.params, compiled_update(iterations), LR),
            slow=True,
            absent=compiler_missing,
        ),
        *_sinkgds(device),
        *_whitened(),
    ]


def our_name(backend: str, iterations: int) -> str:
    """Return the name of SinkGD's row.

    >>> our_name("cpu", 5), our_name("cpu", 1)
    ('sinkgd-cpu', 'sinkgd-cpu-L1')
    """
    suffix = "" if iterations == ITERATIONS[0] else f"-L{iterations}"
    return f"sinkgd-{backend}{suffix}"


def hybrid_name(backend: str) -> str:
    """Return the name of the row of SinkGD with AdamW for what is no hidden matrix."""
    return f"hybrid-{backend}"


def stepper(optimizer: Optimizer) -> Callable[[], object]:
    """Return what makes one step."""
    step: Callable[[], object] = optimizer.step
    return step


def _adamw_fused() -> Contender:
    return Contender(
        ADAMW,
        "AdamW fused",
        lambda p: torch.optim.AdamW(p.params, lr=LR, fused=True),
        copies=2,
        floor_bytes=_passes(_ADAMW_PASSES),
        streams=True,
    )


def _adamw_foreach() -> Contender:
    return Contender(
        "adamw-foreach",
        "AdamW foreach",
        lambda p: torch.optim.AdamW(p.params, lr=LR, foreach=True),
        copies=3,  # two of state, one of temporaries
        floor_bytes=_passes(_ADAMW_PASSES),
    )


def _sinkgds(device: torch.device) -> Iterator[Contender]:
    for backend, reason in backends(device):
        for iterations in ITERATIONS:
            yield Contender(
                our_name(backend, iterations),
                f"SinkGD {backend} L={iterations}",
                _builder(_matrix_groups, backend, iterations),
                floor_bytes=_passes(iterations + _SGD_PASSES),
                slow=backend == "eager",
                absent=_constant(reason),
            )


def _whitened() -> tuple[Contender, ...]:
    """Return those that bring singular values together: a few of them, or all."""
    return (
        Contender(
            "deflated",
            f"SinkGD deflated, {DEFLATED_RANK} directions",
            lambda p: sinkgd.SinkGD(_matrix_groups(p), deflated_rank=DEFLATED_RANK),
            floor_bytes=_passes(ITERATIONS[0] + _DEFLATION_PASSES + _SGD_PASSES),
        ),
        Contender(
            "swan",
            "SWAN",
            lambda p: sinkgd.SWAN(p.params, lr=LR),
            copies=2,
            slow=True,
        ),
    )


def _hybrids(device: torch.device) -> Iterator[Contender]:
    for backend, reason in backends(device):
        yield Contender(
            hybrid_name(backend),
            f"SinkGD {backend} + AdamW",
            _builder(_hybrid_groups, backend, ITERATIONS[0]),
            copies=2,
            floor_bytes=_hybrid_floor,
            absent=_constant(reason),
        )


def backends(device: torch.device) -> list[tuple[str, str | None]]:
    """List every backend with the reason why it does not run on ``device``, or None."""
    return [(name, None if runs else reason) for name, runs, reason in kernels.describe(device)]


def _builder(
    groups: Callable[[Problem], list[dict[str, object]]], backend: str, iterations: int
) -> Callable[[Problem], Optimizer]:
    return lambda problem: sinkgd.SinkGD(
        groups(problem), sinkhorn_iterations=iterations, backend=backend
    )


def _matrix_groups(problem: Problem) -> list[dict[str, object]]:
    return [{"params": problem.params, "algorithm": "sinkgd", "lr": LR}]


def _hybrid_groups(problem: Problem) -> list[dict[str, object]]:
    assert problem.model is not None, "the hybrid needs a model to split"
    return sinkgd.param_groups(problem.model, lr=LR, deflated_rank=0)


def _hybrid_floor(problem: Problem) -> int:
    total = 0
    for group in _hybrid_groups(problem):
        passes = _ADAMW_PASSES if group["algorithm"] == "adamw" else ITERATIONS[0] + _SGD_PASSES
        params = group["params"]
        assert isinstance(params, list)
        total += passes * sum(p.numel() * p.element_size() for _, p in params)
    return total


def _passes(count: int) -> Callable[[Problem], int]:
    return lambda problem: count * problem.bytes


def _constant(reason: str | None) -> Callable[[], str | None]:
    return lambda: reason
