"""Second opinions, written from the papers and in float64. They share no code with the library.

Shapes, everywhere in this file:
    m: rows
    n: columns
"""

import math

import torch
from torch import Tensor


def sinkhorn_knopp(weights: Tensor, num_iters: int) -> Tensor:
    """Classic Sinkhorn: scale ``weights`` (m, n) > 0 to row sums n and column sums m."""
    m, n = weights.shape
    plan = weights.double()
    for _ in range(num_iters):
        plan = torch.diag(n / plan.sum(dim=1)) @ plan
        plan = plan @ torch.diag(m / plan.sum(dim=0))
    return plan


def square_root_sinkhorn(grad: Tensor, num_iters: int) -> Tensor:
    """Algorithm 3 as it is printed, one entry at a time; a zero row or column stays zero."""
    x = grad.double()
    for _ in range(num_iters):
        x = column_projection(row_projection(x))
    return x


def row_projection(x: Tensor) -> Tensor:
    """Give every row the length √n."""
    rows = x.double().tolist()
    n = x.shape[1]
    return torch.tensor(
        [_rescaled(row, math.sqrt(n)) for row in rows], dtype=torch.float64
    ).reshape(x.shape)


def column_projection(x: Tensor) -> Tensor:
    """Give every column the length √m."""
    m, n = x.shape
    result = x.double().clone()
    for j in range(n):
        column = [result[i, j].item() for i in range(m)]
        for i, entry in enumerate(_rescaled(column, math.sqrt(m))):
            result[i, j] = entry
    return result


def frobenius_projection(x: Tensor) -> Tensor:
    """Give the whole matrix the length √(mn)."""
    entries = x.double().flatten().tolist()
    return torch.tensor(_rescaled(entries, math.sqrt(len(entries))), dtype=torch.float64).reshape(
        x.shape
    )


def sign_projection(x: Tensor) -> Tensor:
    """Put 1, -1 or 0 for every entry."""
    signs = [(entry > 0) - (entry < 0) for entry in x.flatten().tolist()]
    return torch.tensor(signs, dtype=torch.float64).reshape(x.shape)


def polar_factor(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, U Vᵀ, from x = U S Vᵀ."""
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ v


def spectral_projection(x: Tensor) -> Tensor:
    """Give every singular value the size √max(m, n)."""
    return math.sqrt(max(x.shape)) * polar_factor(x)


def newton_schulz(x: Tensor, num_steps: int) -> Tensor:
    """Run the iteration on each singular value: s ← s (3 - s²) / 2, from s / (Σ s⁴)^¼."""
    u, singular, v = torch.linalg.svd(x.double(), full_matrices=False)
    start = sum(s**4 for s in singular.tolist()) ** 0.25
    values = [s / start for s in singular.tolist()]
    for _ in range(num_steps):
        values = [s * (3 - s * s) / 2 for s in values]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v


def tempered(x: Tensor, tau: float, num_iters: int, eps: float) -> Tensor:
    """Rows, columns, tanh, entry by entry; then the root-mean-square of before."""
    m, n = x.shape
    rows = [[float(entry) for entry in row] for row in x.double()]
    before = math.sqrt(sum(v * v for row in rows for v in row) / (m * n))
    for _ in range(num_iters):
        sums = [max(sum(abs(v) for v in row), eps) for row in rows]
        rows = [[v / total for v in row] for row, total in zip(rows, sums, strict=True)]
        sums = [max(sum(abs(row[j]) for row in rows), eps) for j in range(n)]
        rows = [[math.tanh(v / t / tau) for v, t in zip(row, sums, strict=True)] for row in rows]
    after = math.sqrt(sum(v * v for row in rows for v in row) / (m * n))
    factor = before / after if after > 0 else 0.0
    return torch.tensor(rows, dtype=torch.float64) * factor


def _rescaled(vector: list[float], length: float) -> list[float]:
    present = math.hypot(*vector)
    return [entry * (length / present) for entry in vector] if present > 0 else vector
