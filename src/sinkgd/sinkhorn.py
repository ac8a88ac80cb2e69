"""Square-root Sinkhorn: normalize rows to length √n and columns to length √m, in turn.

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each (e.g. experts)
"""

from torch import Tensor

from sinkgd import kernels
from sinkgd.kernels import Scales
from sinkgd.multi_normalize import check_matrix
from sinkgd.number_check import check_num_iters, check_tol
from sinkgd.precision import in_full_precision


@in_full_precision
def sinkhorn_scales(
    grad: Tensor, num_iters: int = 5, *, tol: float | None = None, backend: str = "auto"
) -> Scales:
    r"""Return the scales ``(r, c)`` for which ``r * grad * c`` is multi-normalized.

    With :math:`S = G \circ G` one iteration is

    .. math::
        r^2 \leftarrow n / (S c^2), \qquad c^2 \leftarrow m / (S^\top r^2)

    from :math:`c = 1`, so nothing but these two vectors ever changes.

    Args:
        grad: Gradient, ``(..., m, n)``, any real floating dtype. Not modified. Its scale does not
            matter, from 1e-30 to 1e+30. In float32, the lengths of rows, or of columns, may be 68
            decades apart. The scales of still shorter rows and columns are clamped to the range of
            float32, and these rows and columns of the update are then shorter than the others.
        num_iters: Iterations L, at least 1. The paper uses 5.
        tol: Stop iterating a matrix as soon as an iteration changes no row scale by more than
            ``tol``, relative to its previous value. The first iteration never stops it. On a GPU,
            the eager backend then waits for the device in every iteration. None never stops early.
        backend: ``"auto"`` for the fastest backend that is installed and runs on ``grad``'s device,
            or the name of a backend in `sinkgd.kernels.backends()`.

    Returns:
        r ``(..., m, 1)`` and c ``(..., 1, n)``, float32, or float64 if ``grad`` is. Only their
        product counts: a factor may have moved from one to the other. The scale of a zero row or
        column is 0. A non-finite entry makes scales of its matrix non-finite.

    Raises:
        TypeError: If ``grad`` is complex, integer or sparse, or another argument has the wrong
            type.
        ValueError: If ``grad`` has fewer than two dimensions, ``num_iters`` is below 1, ``tol`` is
            below 0, or ``backend`` is unknown or does not run on ``grad``'s device.
        ImportError: If ``backend`` names a backend that is not installed or cannot run here.

    Examples:
        >>> import torch
        >>> grad = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
        >>> r, c = sinkhorn_scales(grad)
        >>> (r * grad * c).round(decimals=4)  # a matrix of rank one goes to its signs
        tensor([[1., 1.],
                [1., 1.]])
    """
    check_matrix("sinkhorn_scales", grad)
    check_num_iters(num_iters)
    check_tol(tol)
    return kernels.select(backend, grad.device).scales([grad], num_iters, tol=tol)[0]


@in_full_precision
def sr_sinkhorn(grad: Tensor, num_iters: int = 5, *, backend: str = "auto") -> Tensor:
    r"""Normalize every row of ``grad`` to length √n, then every column to √m, ``num_iters`` times.

    One iteration is

    .. math::
        X \leftarrow \sqrt{n}\, Q(X)^{-1} X, \qquad X \leftarrow \sqrt{m}\, X R(X)^{-1}

    where :math:`Q(X)` and :math:`R(X)` are the diagonal matrices of row and column lengths. The
    entrywise squares of the iterates are the classic Sinkhorn iterates of ``grad**2``, so a matrix
    without zeros converges to rows of length √n *and* columns of length √m. Unless a column is
    zero, the update has root-mean-square 1, as a sign update has, whatever the scale of ``grad``.

    Args:
        grad: Gradient, ``(..., m, n)``, any real floating dtype. Not modified.
        num_iters: Iterations L, at least 1. The paper uses 5.
        backend: As for `sinkhorn_scales`.

    Returns:
        The update, ``(..., m, n)``, in ``grad``'s dtype; computed in float32, or float64 if
        ``grad`` is. Its columns have length √m; its rows approach √n as ``num_iters`` grows. Zero
        rows and columns stay zero.

    Raises:
        TypeError: If ``grad`` is complex, integer or sparse, or ``num_iters`` is not an integer.
        ValueError: If ``grad`` has fewer than two dimensions, ``num_iters`` is below 1, or
            ``backend`` is unknown or does not run on ``grad``'s device.
        ImportError: If ``backend`` names a backend that is not installed or cannot run here.

    Examples:
        >>> import torch
        >>> update = sr_sinkhorn(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]))
        >>> update.square().sum(dim=-2).round(decimals=4)  # the squared column lengths: m
        tensor([2., 2.])
        >>> update.square().sum(dim=-1)  # the squared row lengths: near n, nearer with num_iters
        tensor([1.9112, 2.0888])

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
        Algorithm 3. https://arxiv.org/abs/2502.06742
    """
    check_matrix("sr_sinkhorn", grad)
    row, col = sinkhorn_scales(grad, num_iters, backend=backend)
    return (grad.to(row.dtype) * row * col).to(grad.dtype)
