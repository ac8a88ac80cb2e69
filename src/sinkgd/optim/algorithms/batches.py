"""Matrices of one shape, taken together: many small products cost more than a large one.

Shapes, everywhere in this file:
    b: matrices that lie in one tensor, such as experts
    m: rows; n: columns
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sinkgd.newton_schulz import is_transposed, matrix_buffer
from sinkgd.optim.algorithms.contract import Slot
from sinkgd.optim.algorithms.layout import Split, matrices_of

# What a batch may use, unless one matrix alone uses more; a larger matrix goes by itself.
# On a CPU a batch saves calls and wants to stay in cache. On one core of an Intel Xeon (2 MiB of
# L2) a step of llama-60m was fastest with 4 to 16 MiB, and 10 to 90 % slower with 64 and 256.
CPU_BATCH_BYTES = 8 << 20
# Not measured: a GPU wants some hundred tiles of 128 x 128, so about twenty matrices of 512 x 512.
BATCH_BYTES = 64 << 20

# What a batch uses, in matrices: the stack that becomes the result, and the two of scratch that the
# most needy of our norms has.
MATRICES_IN_USE = 3


class Piece(NamedTuple):
    """Some matrices of one parameter."""

    slot: int
    first_entry: int  # its place among the entries of all matrices of the parameter
    param: Tensor  # (b, m, n), a view
    grad: Tensor  # (b, m, n)


def batches(slots: Sequence[Slot], *, layout: str, split: Split) -> Iterator[list[Piece]]:
    """Yield all matrices of the parameters, those of one shape, dtype and order of memory together.

    Args:
        slots: The parameters, on one device.
        layout: How they are seen as matrices.
        split: How their rows are cut.
    """
    waiting: dict[tuple[object, ...], list[Piece]] = {}
    for piece in _pieces(slots, layout, split):
        grad = piece.grad
        kind = (grad.shape[1:], grad.dtype, is_transposed(grad))
        batch = waiting.setdefault(kind, [])
        if batch and _count(batch) + len(grad) > _capacity(grad):
            yield batch
            batch = waiting[kind] = []
        batch.append(piece)
    yield from waiting.values()


def stacked(grads: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Return gradients ``(b, m, n)`` of one kind as one tensor, in float32 or wider.

    Returns:
        The matrices of all, and whether they are a copy.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if len(grads) == 1 and grads[0].dtype == dtype:
        return grads[0], False
    shape = (sum(len(grad) for grad in grads), *grads[0].shape[1:])
    stack = matrix_buffer(grads[0][:1].expand(shape), dtype)
    if is_transposed(stack):
        torch.cat([grad.mT for grad in grads], out=stack.mT)
    else:
        torch.cat(list(grads), out=stack)
    return stack, True


def _pieces(slots: Sequence[Slot], layout: str, split: Split) -> Iterator[Piece]:
    for i, slot in enumerate(slots):
        first_entry = 0
        for whole, slope in matrices_of(slot.param, slot.grad, layout=layout, split=split):
            for param, grad in _cut(whole, slope):
                yield Piece(i, first_entry, param, grad)
                first_entry += param.numel()


def _cut(param: Tensor, grad: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Cut ``(..., m, n)``, in reading order, into ``(b, m, n)`` that fit into a batch."""
    if param.ndim == 2:
        return [(param.unsqueeze(0), grad.unsqueeze(0))]
    if param.ndim == 3:
        size = _capacity(grad)
        return zip(torch.split(param, size), torch.split(grad, size), strict=True)
    return (part for pair in zip(param, grad, strict=True) for part in _cut(*pair))


def _count(batch: Sequence[Piece]) -> int:
    return sum(len(piece.grad) for piece in batch)


def _capacity(grad: Tensor) -> int:
    """Return how many matrices like those of ``grad`` may be in a batch."""
    itemsize = torch.promote_types(grad.dtype, torch.float32).itemsize
    limit = CPU_BATCH_BYTES if grad.device.type == "cpu" else BATCH_BYTES
    return max(1, limit // (MATRICES_IN_USE * itemsize * grad[0].numel()))
