"""Sums over process groups, asked for side by side and sent together.

A computation is a generator function that does not run before `exchange` runs it. It yields a `Sum`
and goes on when its vector was added up. It yields another computation, or a list of them that run
side by side, and is sent what they return. Those that wait for one group share one message, so that
the number of messages is that of the longest computation and not of all.

torch.compile captures computations that need no message. It allows for no generator that outlives
the function that made it, and gives ``yield from`` no value; hence `Computation`, and ``yield``.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# What is yielded, and sent back, is explained above; types cannot tell which belongs to which.
Steps = Generator[Any, Any, Result]


class Computation(NamedTuple, Generic[Result]):
    """A call of a generator function, for `exchange` to make."""

    function: Callable[..., Steps[Result]]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def computation(
    function: Callable[Arguments, Steps[Result]],
) -> Callable[Arguments, Computation[Result]]:
    """Make calls of a generator function computations."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Computation[Result]:
        return Computation(function, args, kwargs)

    return call


class Sum(NamedTuple):
    """A vector that is to be replaced by its sum over a group."""

    vector: Tensor
    group: "ProcessGroup"
    then: Sequence["ProcessGroup"] = ()  # over which it asks for sums soon: these wait for it


def sums_in_turn(
    vector: Tensor, groups: Sequence["ProcessGroup"], then: Sequence["ProcessGroup"] = ()
) -> list[Sum]:
    """Return what adds up a vector over groups, one after the other, and soon others over some."""
    return [Sum(vector, group, (*groups[i + 1 :], *then)) for i, group in enumerate(groups)]


@computation
def immediate(result: Result) -> Steps[Result]:
    """Return ``result``, without a sum."""
    yield from ()
    return result


def run(asked: Computation[Result]) -> Result:
    """Run a computation to its end, and return what it returns."""
    (result,) = exchange([asked])
    return result


def exchange(computations: Sequence[Computation[Result]]) -> list[Result]:
    """Run computations to their ends, and return what they return.

    Without sums each runs to its end before the next one begins, and torch.distributed is not
    imported. Otherwise every rank must give the same computations in the same order, as far as they
    share groups.
    """
    results: list[Any] = [None] * len(computations)
    # All of it in one function: torch.compile captures it whole, or leaves it whole to Python.
    ready: list[tuple[_Task, Any]] = []
    for i, own in reversed([*enumerate(computations)]):
        ready.append((_Task(own.function(*own.args, **own.kwargs), None, i), None))
    waiting: list[tuple[_Task, Sum]] = []
    while ready or waiting:
        if not ready:
            ready += [(task, None) for task in _send_next(waiting)[::-1]]
        task, value = ready.pop()
        try:
            asked = task.steps.send(value)
        except StopIteration as end:
            result = end.args[0] if end.args else None  # torch.compile knows no end.value
            above = task.above
            if above is None:
                results[task.place] = result
                continue
            above.answers[task.place] = result
            above.missing -= 1
            if above.missing == 0:
                answers, above.answers = above.answers, []
                ready.append((above, answers if above.wants_list else answers[0]))
            continue
        if isinstance(asked, Sum):
            waiting.append((task, asked))
            continue
        task.wants_list = isinstance(asked, list)
        below = asked if task.wants_list else [asked]
        task.answers, task.missing = [None] * len(below), len(below)
        for i, own in reversed([*enumerate(below)]):
            ready.append((_Task(own.function(*own.args, **own.kwargs), task, i), None))
        if not below:
            ready.append((task, []))
    return results


class _Task:
    """A computation under way, and the one that waits for it, if one does."""

    def __init__(self, steps: Steps[Any], above: "_Task | None", place: int) -> None:
        self.steps, self.above, self.place = steps, above, place
        self.answers: list[Any] = []  # of those that it waits for
        self.missing = 0
        self.wants_list = False


def _send_next(waiting: list[tuple[_Task, Sum]]) -> list[_Task]:
    """Add up over one group, and return who can go on; others remain.

    A group whose message would soon be followed by another one waits for the others to catch up.
    """
    then = {group for _, asked in waiting for group in asked.then}
    asked_for = dict.fromkeys(asked.group for _, asked in waiting)
    group = next((own for own in asked_for if own not in then), next(iter(asked_for)))
    served = [own for own in waiting if own[1].group is group]
    waiting[:] = [own for own in waiting if own[1].group is not group]
    messages: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, asked in served:
        kind = asked.vector.device, asked.vector.dtype
        messages.setdefault(kind, []).append(asked.vector)
    for vectors in messages.values():
        _add_up(vectors, group)
    return [task for task, _ in served]


def _add_up(vectors: Sequence[Tensor], group: "ProcessGroup") -> None:
    from torch.distributed import all_reduce  # noqa: PLC0415 - it takes longer than all the rest

    if len(vectors) == 1:
        all_reduce(vectors[0], group=group)
        return
    message = torch.cat(list(vectors))
    all_reduce(message, group=group)
    parts = torch.split(message, [len(vector) for vector in vectors])
    torch._foreach_copy_(list(vectors), list(parts))
