"""The scales of a matrix whose squares leave float32's range, or that holds NaN or infinity."""

import torch
from torch import Tensor

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.cpu.jobs import MatricesJob, float32_address
from sinkgd.kernels.cpu.sources import with_form
from sinkgd.kernels.eager import sinkhorn
from sinkgd.kernels.layout import dense, matrix_of
from sinkgd.kernels.level import level_, scales_of


def repair(
    source: Tensor,
    found: Scales,
    place: int,
    num_iters: int,
    *,
    tol: float | None,
    start: Tensor | None,
) -> None:
    """Find the scales of the matrix at ``place``, whose squares left float32's range.

    A copy scaled by powers of two is read; where that fails too, `sinkhorn` is asked.
    """
    matrix = matrix_of(source, place)
    m, n = matrix.shape
    begin = None if start is None else start.view(-1, 1, n)[place]
    again = _rescaled(matrix, num_iters, tol=tol, start=begin)
    if again is None:
        again = sinkhorn(matrix, num_iters, tol=tol, start=begin)
    found.row.view(-1, m, 1)[place] = again.row
    found.col.view(-1, 1, n)[place] = again.col


def _rescaled(
    matrix: Tensor, num_iters: int, *, tol: float | None, start: Tensor | None
) -> Scales | None:
    """Run the loops on a copy scaled by powers of two; None where that fails too.

    Powers of two change no rounding, so the bits are those that an unbounded float32 would give.
    """
    S = matrix.to(torch.float32, copy=True).abs_()
    level = level_(S)
    S, form = with_form(dense(S))
    m, n = S.shape
    first = level.t if start is None else level.t * start
    found = Scales(
        torch.empty(m, 1, dtype=torch.float32, device="cpu"), first.square().float().reshape(1, n)
    )
    job = MatricesJob()
    job.add(
        S.data_ptr(), form, (float32_address(found.row), float32_address(found.col)), started=True
    )
    if job.find_scales(num_iters, tol):
        return None
    return scales_of(found.row / level.s, found.col / level.t, torch.float32)
