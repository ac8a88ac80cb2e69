"""Approximate the nearest (semi-)orthogonal matrix by matrix products: Newton–Schulz steps.

Letters, everywhere in this file:
    m, n: rows and columns; ...: leading batch dimensions, one independent matrix each
    b: the number of matrices in a batch, with all leading dimensions in one
    k: the shorter side, min(m, n)
    A: the gram matrix of the iterate X on its shorter side, (b, k, k): X Xᵀ or Xᵀ X
    half: -A / 2, which is computed by one matrix product; a step is then X ← 1.5 X + half X, or
        X ← 1.5 X + X half if X is tall
"""

import math

import torch
from torch import Tensor

from sinkgd.number_check import check_whole_number
from sinkgd.precision import in_full_precision

# If one side is at least twice the other, several steps at a time are taken on the gram matrix. A
# step costs 6 k³ flops on the gram matrix, and 4 k² max(m, n) on the matrix itself. The gram matrix
# is cheaper if one side is more than 1.5 times the other. If one side is at least twice the other,
# the scratch also stays within the two matrices that `orthogonalize` promises.
OBLONG = 2

# How many steps are taken at a time. The eigenvalues of the gram matrix are the squares of singular
# values. The rounding error of the largest eigenvalue is also an error of every small one. This
# error grows as small singular values do, by a factor of 1.5 per step: five steps make it about
# 8 times as large. Then a new gram matrix is computed.
STEPS_AT_ONCE = 5


@in_full_precision
def orthogonalize(x: Tensor, num_steps: int = 5) -> Tensor:
    r"""Push every nonzero singular value of ``x`` towards 1, and keep the singular vectors.

    Start from :math:`X_0 = x / \sqrt{\lVert x x^\top \rVert_F}`, and repeat ``num_steps`` times:

    .. math::
        X \leftarrow \tfrac12 (3I - X X^\top) X

    The limit is the polar factor :math:`(x x^\top)^{-1/2} x` for a wide matrix and
    :math:`x (x^\top x)^{-1/2}` for a tall one. In exact arithmetic these are the iterates of the
    coupled iteration that SWAN runs on :math:`x x^\top`; this form computes no inverse square root,
    so the iterates stay bounded even if ``x`` is singular. With k the shorter and l the longer
    side, a step costs ``4 * k**2 * l`` flops. If l is at least 2 k, the coupled iteration itself is
    run, five steps at a time, and five steps cost ``24 * k**3 + 4 * k**2 * l``. A singular value
    well below the largest grows by a factor of 1.5 per step. So ``num_steps`` decides how small a
    singular value may be at first and still come close to 1.

    Args:
        x: ``(..., m, n)``, float32 or wider. Not modified, and not differentiated.
        num_steps: Steps, at least 1. SWAN takes about 5.

    Returns:
        ``(..., m, n)``, with singular values in [0, 1]. A zero matrix stays zero. Needs at most two
        matrices of scratch besides the result.

    Raises:
        TypeError: If ``num_steps`` is not an integer.
        ValueError: If ``num_steps`` is below 1.

    Examples:
        >>> orthogonalize(torch.diag(torch.tensor([3.0, 4.0])), num_steps=10)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Ma et al., SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training.
        https://arxiv.org/abs/2412.13148
    """
    check_whole_number("num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if x.numel() == 0:
        return x.clone()
    return orthogonalize_into(x.detach(), num_steps, matrix_buffer(x), matrix_buffer(x))[0]


def orthogonalize_into(
    x: Tensor, num_steps: int, result: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Orthogonalize ``x`` in the memory of ``result`` and ``spare``; both are overwritten.

    Args:
        x: ``(..., m, n)``, not empty. It may be ``result``; otherwise it is only read.
        num_steps: Steps, at least 1.
        result: A `matrix_buffer` of ``x``.
        spare: Another such buffer, with the same memory order.

    Returns:
        The two buffers, the one with the result first.
    """
    torch.div(x, or_one(largest_entry(x, (-2, -1))), out=result)
    first = x = _stack(result)
    other = _stack(spare)
    tall = x.shape[-2] > x.shape[-1]
    k, length = min(x.shape[-2:]), max(x.shape[-2:])
    at_once = STEPS_AT_ONCE if length >= OBLONG * k else 1
    half = x.new_empty(len(x), k, k)
    for done in range(0, num_steps, at_once):
        _product(x.mT if tall else x, x if tall else x.mT, -0.5, out=half)
        if done == 0:
            x /= _bring_to_size_one(half, room=other)
        # Several steps multiply X by a factor. A single step adds a product to 1.5 X, which rounds
        # less than a multiplication by half + 1.5 I.
        steps = min(at_once, num_steps - done)
        factor = half if steps == 1 else _steps_on_gram(half, steps, room=other)
        left, right = (x, factor) if tall else (factor, x)
        torch.baddbmm(x, left, right, beta=1.5 if steps == 1 else 0, out=other)
        x, other = other, x
    return (result, spare) if x is first else (spare, result)


def matrix_buffer(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return uninitialized memory for matrices like ``x``, ``(..., m, n)``.

    If ``x`` is stored column by column, so is the buffer; otherwise it is stored row by row.
    """
    if is_transposed(x):
        return matrix_buffer(x.mT, dtype).mT
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def is_transposed(x: Tensor) -> bool:
    """Whether ``x`` is stored column by column, and not row by row."""
    return x.stride(-2) < x.stride(-1)


def largest_entry(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the largest absolute value along ``dim``, with keepdim=True, without copying ``x``."""
    return torch.maximum(x.amax(dim=dim, keepdim=True), x.amin(dim=dim, keepdim=True).neg_())


def or_one(x: Tensor) -> Tensor:
    """Replace zeros by ones, so that the result can be a divisor."""
    return torch.where(x == 0, 1, x)


def sum_of_matrix(x: Tensor) -> Tensor:
    """Return the sum over each matrix, ``(..., 1, 1)``, with the same bits in any batch."""
    # Torch divides a sum among its threads only if the result is a single number. A direct sum
    # would be divided for one matrix and not for a batch.
    return x.sum(dim=-1, keepdim=True).sum(dim=-2, keepdim=True)


def _stack(buffer: Tensor) -> Tensor:
    """View a `matrix_buffer` as ``(b, m, n)`` or ``(b, n, m)``, whichever is contiguous."""
    stored = buffer.mT if is_transposed(buffer) else buffer
    return stored.view(-1, *stored.shape[-2:])


def _product(left: Tensor, right: Tensor, factor: float, *, out: Tensor) -> None:
    """Write ``factor * left @ right`` to ``out``, whatever it contains."""
    torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)


def _bring_to_size_one(half: Tensor, *, room: Tensor) -> Tensor:
    """Divide A by its Frobenius norm; return the root of the norm, by which X must be divided."""
    squares = torch.square(half, out=_carve(room, half.shape))
    length = or_one(2 * sum_of_matrix(squares).sqrt_())
    half /= length
    return length.sqrt_()


def _steps_on_gram(half: Tensor, num_steps: int, *, room: Tensor) -> Tensor:
    """Return the matrix ``(b, k, k)`` by which ``num_steps`` steps multiply X.

    It is the Z of the coupled iteration, which starts from Y = A and Z = I: T = (3 I - Z Y) / 2,
    Y ← Y T, Z ← T Z. Z approaches the inverse root of A.

    Args:
        half: -A / 2; overwritten.
        num_steps: Steps, at least 2.
        room: Memory for at least ``(2, b, k, k)``; overwritten.
    """
    Z = _add_identity(half.clone())
    Y, free = _carve(room, (2, *half.shape)).unbind()
    _product(half, Z, -2, out=Y)  # the first T is also the first Z
    buffers = [half, free]
    for step in range(1, num_steps):
        T = buffers.pop()
        _product(Z, Y, -0.5, out=T)
        _add_identity(T)
        if step < num_steps - 1:  # nothing reads the last Y
            _product(Y, T, 1, out=buffers[0])
            Y, buffers[0] = buffers[0], Y
        _product(T, Z, 1, out=buffers[0])
        Z, buffers = buffers[0], [Z, T]
    return half.copy_(Z)  # since the caller overwrites ``room``


def _carve(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    return room.view(-1)[: math.prod(shape)].view(shape)


def _add_identity(half: Tensor) -> Tensor:
    half.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return half
