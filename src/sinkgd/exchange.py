"""A scheduler of coroutines that add up vectors over process groups, with few messages.

A computation is a call of a generator function, which `exchange` runs. If it yields a `Sum`, it
continues when the vector has been added up. If it yields another computation, or a list of
computations to run side by side, it is sent their results. All vectors of one dtype and device that
wait for one group share one message. So a group sends about as many messages as the computation
with the most sums needs, not as many as all computations need together.

torch.compile captures computations that need no message. It does not support generators that
outlive the function that made them, nor values of ``yield from``. So `exchange` itself
calls the generator function of a `Computation`, and results are passed by ``yield``.
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
# Types cannot say which value is sent back for which yielded one; see the top of this file.
Steps = Generator[Any, Any, Result]


class Computation(NamedTuple, Generic[Result]):
    """A call of a generator function; the call is made later, by `exchange`."""

    function: Callable[..., Steps[Result]]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def computation(
    function: Callable[Arguments, Steps[Result]],
) -> Callable[Arguments, Computation[Result]]:
    """Decorate a generator function, so that a call returns a `Computation`."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Computation[Result]:
        return Computation(function, args, kwargs)

    return call


class Sum(NamedTuple):
    """A request to replace a vector by its sum over a group."""

    vector: Tensor
    group: "ProcessGroup"
    then: Sequence["ProcessGroup"] = ()  # groups of later sums, which wait for this one


def sums_in_turn(
    vector: Tensor, groups: Sequence["ProcessGroup"], then: Sequence["ProcessGroup"] = ()
) -> list[Sum]:
    """Return the requests that add up a vector over several groups, one after the other.

    Args:
        vector: The vector, replaced by its sum.
        groups: The groups.
        then: The groups of later sums, which wait for these.
    """
    return [Sum(vector, group, (*groups[i + 1 :], *then)) for i, group in enumerate(groups)]


@computation
def immediate(result: Result) -> Steps[Result]:
    """Return a result that is already known."""
    yield from ()
    return result


def run(asked: Computation[Result]) -> Result:
    """Run one computation, and return its result."""
    (result,) = exchange([asked])
    return result


def exchange(computations: Sequence[Computation[Result]]) -> list[Result]:
    """Run computations side by side, and return their results.

    Without sums, each computation ends before the next begins, and torch.distributed is not
    imported. With sums, all ranks of a process group must pass the computations that sum over this
    group in the same order.
    """
    results: list[Any] = [None] * len(computations)
    # This is not split into functions, so that torch.compile captures all of it or none.
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
            result = end.args[0] if end.args else None  # torch.compile does not know end.value
            parent = task.parent
            if parent is None:
                results[task.index] = result
                continue
            parent.answers[task.index] = result
            parent.missing -= 1
            if parent.missing == 0:
                answers, parent.answers = parent.answers, []
                ready.append((parent, answers if parent.wants_list else answers[0]))
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
    """A running computation, and the computation that waits for its result."""

    def __init__(self, steps: Steps[Any], parent: "_Task | None", index: int) -> None:
        self.steps, self.parent, self.index = steps, parent, index
        self.answers: list[Any] = []  # results of the computations that it waits for
        self.missing = 0
        self.wants_list = False


def _send_next(waiting: list[tuple[_Task, Sum]]) -> list[_Task]:
    """Add up the vectors that wait for one group, and return the tasks that can continue.

    A group for which more vectors will arrive soon waits for them, unless all groups would wait.
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
    from torch.distributed import all_reduce  # noqa: PLC0415 - this import takes long

    if len(vectors) == 1:
        all_reduce(vectors[0], group=group)
        return
    message = torch.cat(list(vectors))
    all_reduce(message, group=group)
    parts = torch.split(message, [len(vector) for vector in vectors])
    torch._foreach_copy_(list(vectors), list(parts))
