"""The fastest way found to stream a workload's matrices through this machine.

A floor is bytes divided by a bandwidth, so the bandwidth must be one that the machine reaches:
several operations that do nothing but pass over as many bytes are timed in the same rounds as the
optimizers, and the best bytes a second of any of them is taken. Reads and the copy pass over one
tensor of that size, so that calls do not count where matrices are many and small.

A pass is one reading or one writing of all the matrices, whatever the hardware does besides, such
as reading a line of memory before it is overwritten.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.lab.bench.problem import Problem
from sinkgd.lab.bench.quartiles import Quartiles, quartiles, taken


@dataclass(frozen=True)
class Probe:
    """An operation that passes over all the matrices."""

    name: str
    passes: int
    build: Callable[[Problem], Callable[[], object]]
    copies: int = 0  # what it allocates, in sizes of all the matrices


@dataclass(frozen=True)
class Bandwidth:
    """What one operation reached."""

    name: str
    moved_bytes: int  # a call
    seconds: tuple[float | None, ...]  # of a call, one a round
    bytes_per_second: Quartiles


def probes(device: torch.device) -> tuple[Probe, ...]:
    """Return the operations to try, those of the backend that ``"auto"`` takes included."""
    backend = kernels.select("auto", device)
    return (
        Probe("torch.sum", 1, lambda p: partial(torch.sum, p.flat_grads), copies=1),
        Probe("torch.dot", 1, lambda p: partial(torch.dot, p.flat_grads, p.flat_grads), copies=1),
        Probe("torch.amax of the bits", 1, _amax_of_bits, copies=1),
        Probe("copy", 2, _copy, copies=2),
        Probe(
            f"{backend.name}: one iteration",
            1,
            lambda p: partial(backend.scales, [_as_matrix(grad) for grad in p.grads], 1),
        ),
        Probe(f"{backend.name}: update", 3, partial(update_call, backend)),
    )


def bandwidth(name: str, moved_bytes: int, seconds: Sequence[float | None]) -> Bandwidth:
    """Summarize the turns of an operation that moves ``moved_bytes`` a call."""
    rates = [moved_bytes / turn for turn in taken(seconds)]
    return Bandwidth(name, moved_bytes, tuple(seconds), quartiles(rates))


def fastest(candidates: Sequence[Bandwidth]) -> Bandwidth:
    """Return the candidate with the highest median."""
    return max(candidates, key=lambda candidate: candidate.bytes_per_second.median)


def floor_seconds(moved_bytes: int, best: Bandwidth) -> tuple[float | None, ...]:
    """Return how long ``moved_bytes`` take at a bandwidth, round by round.

    >>> floor_seconds(300, bandwidth("copy", 100, [1.0, None, 2.0]))
    (3.0, None, 6.0)
    """
    share = moved_bytes / best.moved_bytes
    return tuple(None if turn is None else share * turn for turn in best.seconds)


def calls(found: Sequence[Probe], problem: Problem) -> Mapping[str, Callable[[], object]]:
    """Return what a turn of each probe calls, by name."""
    return {probe.name: probe.build(problem) for probe in found}


def _amax_of_bits(problem: Problem) -> Callable[[], object]:
    # Integers of four bytes are compared without conversion, which bfloat16 is not.
    flat = problem.flat_grads
    return partial(torch.amax, flat.view(torch.int32) if flat.nbytes % 4 == 0 else flat)


def _copy(problem: Problem) -> Callable[[], object]:
    return partial(torch.empty_like(problem.flat_grads).copy_, problem.flat_grads)


def update_call(backend: kernels.Backend, problem: Problem) -> Callable[[], object]:
    """Return a call of the backend's update of all parameters."""
    params = [_as_matrix(param.detach()) for param in problem.params]
    grads = [_as_matrix(grad) for grad in problem.grads]
    scales = backend.scales(grads, 1)
    return partial(backend.update_, params, grads, scales, keep=1.0, step=-1e-4)


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim > 1 else tensor.unsqueeze(0)
