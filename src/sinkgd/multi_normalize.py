"""Multi-normalization: normalize in several norms at once, by projecting on them in turn.

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkgd.newton_schulz import matrix_buffer
from sinkgd.norms import Norm, checked_norms, is_built_in
from sinkgd.number_check import check_num_iters, check_tol
from sinkgd.precision import in_full_precision


@in_full_precision
def multi_normalize(
    grad: Tensor, norms: Sequence[Norm], num_iters: int = 5, *, tol: float | None = None
) -> Tensor:
    r"""Project ``grad`` on each norm in turn, ``num_iters`` times over.

    .. math::
        X \leftarrow P_{g_K}(\dots P_{g_1}(X)), \qquad L \text{ times}

    The result is normalized in the last norm of the list, and in the others only in the limit;
    `residuals` measures how far it is from being normalized in each of them. With
    ``[RowNorm(), ColumnNorm()]`` this is `sr_sinkhorn`, computed in a general and slower way.

    Args:
        grad: Gradient, ``(..., m, n)``, any real floating dtype. Not modified, and not
            differentiated.
        norms: The norms g₁ … g_K, in the order of their projections.
        num_iters: Iterations L, at least 1.
        tol: Stop as soon as every residual of every matrix is at most ``tol``. Measuring the
            residuals costs a projection on each norm per iteration. On a GPU, every iteration then
            waits for the device. None never stops early.

    Returns:
        The update, ``(..., m, n)``, in ``grad``'s dtype; computed in float32, or float64 if
        ``grad`` is. Its root-mean-square is 1, or less if ``grad`` has zeros. Needs one matrix of
        scratch besides the result, two with a `SpectralNorm`, two more with ``tol``, and the memory
        that norms of your own need.

    Raises:
        TypeError: If ``grad`` is complex, integer or sparse, or another argument has the wrong
            type.
        ValueError: If ``grad`` has fewer than two dimensions, ``norms`` is empty, ``num_iters`` is
            below 1, or ``tol`` below 0.

    Examples:
        >>> from sinkgd import ColumnNorm, RowNorm
        >>> grad = torch.tensor([[8.0, 1.0], [-1.0, 2.0]])
        >>> multi_normalize(grad, [RowNorm(), ColumnNorm()], num_iters=50).square()
        tensor([[1.8824, 0.1176],
                [0.1176, 1.8824]])

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
        Algorithm 1. https://arxiv.org/abs/2502.06742
    """
    check_matrix("multi_normalize", grad)
    check_num_iters(num_iters)
    norms = checked_norms(norms)
    check_tol(tol)
    wide = torch.promote_types(grad.dtype, torch.float32)
    x = grad.detach()
    if grad.dtype != wide:
        x = matrix_buffer(x, wide).copy_(x)
    return take_turns(x, norms, num_iters, tol=tol, own=grad.dtype != wide).to(grad.dtype)


def take_turns(
    x: Tensor,
    norms: Sequence[Norm],
    num_iters: int,
    *,
    tol: float | None = None,
    own: bool = False,
) -> Tensor:
    """Run `multi_normalize` on checked arguments.

    Args:
        x: ``(..., m, n)``, float32 or float64.
        norms: As for `multi_normalize`.
        num_iters: As for `multi_normalize`.
        tol: As for `multi_normalize`.
        own: Whether ``x`` is a `matrix_buffer` that may be overwritten; otherwise it is only read.

    Returns:
        The update, ``(..., m, n)``. A norm that is not built in may return its argument, and so
        the update may be ``x`` itself.
    """
    result = x if own else None
    spare: Tensor | None = None
    for _ in range(num_iters):
        for norm in norms:
            if is_built_in(norm) and x.numel() > 0:
                result = matrix_buffer(x) if result is None else result
                spare = matrix_buffer(result) if spare is None else spare
                x, spare = norm.project_into(x, result, spare)
                result = x
            else:
                x = norm.project(x)
                result = spare = None  # a norm that is not built in may keep these tensors
        if tol is not None and all(bool((r <= tol).all()) for r in residuals(x, norms)):
            break
    return x


@in_full_precision
def residuals(x: Tensor, norms: Sequence[Norm]) -> tuple[Tensor, ...]:
    r"""Return the distance to each projection: :math:`\lVert x - P_g(x) \rVert_F / \sqrt{mn}`.

    Args:
        x: ``(..., m, n)``, e.g. a result of `multi_normalize`.
        norms: The norms to check.

    Returns:
        One tensor ``(...,)`` per norm: the root-mean-square of the difference between ``x`` and its
        projection. It is 0 if ``x`` is normalized in this norm.

    Examples:
        >>> from sinkgd import ColumnNorm, RowNorm
        >>> x = ColumnNorm().project(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        >>> residuals(x, [RowNorm(), ColumnNorm()])
        (tensor(0.2611), tensor(0.))
    """
    check_matrix("residuals", x)
    norms = checked_norms(norms)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return tuple(_root_mean_square_(norm.project(x) - x) for norm in norms)


def _root_mean_square_(x: Tensor) -> Tensor:
    return x.square_().mean(dim=(-2, -1)).sqrt_()


def check_matrix(function: str, grad: Tensor) -> None:
    """Refuse anything but a real, dense matrix or batch of matrices; errors name ``function``."""
    if grad.layout != torch.strided:
        raise TypeError(
            f"{function} needs a dense tensor, got layout {grad.layout}; use to_dense()"
        )
    if not grad.is_floating_point():
        raise TypeError(f"{function} needs a real floating dtype, got {grad.dtype}")
    if grad.ndim < 2:
        raise ValueError(f"{function} needs a matrix, got a tensor of shape {tuple(grad.shape)}")
