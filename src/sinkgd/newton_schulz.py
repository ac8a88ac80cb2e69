"""The nearest (semi-)orthogonal matrix by matrix products alone: a Newton–Schulz iteration.

Shapes, everywhere in this file:
    m: rows
    n: columns
    ...: leading batch dimensions, one independent matrix each
"""

import torch
from torch import Tensor


def orthogonalize(x: Tensor, num_steps: int = 5) -> Tensor:
    r"""Push every singular value of ``x`` towards 1 and keep its singular vectors.

    From :math:`X_0 = x / \sqrt{\lVert x x^\top \rVert_F}`, ``num_steps`` times:

    .. math::
        X \leftarrow \tfrac12 (3I - X X^\top) X

    The limit is the polar factor :math:`(x x^\top)^{-1/2} x` for a wide matrix and
    :math:`x (x^\top x)^{-1/2}` for a tall one. In exact arithmetic these are the iterates of the
    coupled iteration that SWAN runs on :math:`x x^\top`; this form takes no inverse square root,
    so a singular matrix stays bounded. The products are on the shorter side: a step costs
    ``4 * min(m, n)**2 * max(m, n)`` flops. A singular value well below the largest grows by 1.5
    a step, so ``num_steps`` sets how small a one still counts.

    Args:
        x: ``(..., m, n)``, float32 or wider. Not modified.
        num_steps: Steps, at least 1. SWAN takes about 5.

    Returns:
        ``(..., m, n)``, with singular values in [0, 1]. A zero matrix stays zero.

    Raises:
        ValueError: If ``num_steps`` is below 1.

    Example:
        >>> orthogonalize(torch.diag(torch.tensor([3.0, 4.0])), num_steps=10)
        tensor([[1., 0.],
                [0., 1.]])

    References:
        Ma et al., SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training.
        https://arxiv.org/abs/2412.13148
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if x.numel() == 0:
        return x.clone()
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    peak = wide.abs().amax(dim=(-2, -1), keepdim=True)
    wide = wide / torch.where(peak == 0, 1, peak)
    gram_length = torch.linalg.matrix_norm(wide @ wide.mT, keepdim=True)
    wide = wide / torch.where(gram_length == 0, 1, gram_length).sqrt()
    for _ in range(num_steps):
        wide = 1.5 * wide - 0.5 * ((wide @ wide.mT) @ wide)
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT
