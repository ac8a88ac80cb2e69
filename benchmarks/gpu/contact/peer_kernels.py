"""The Triton kernels of the peer's loop; importing this needs triton."""

import triton
import triton.language as tl

COLUMNS = 32  # columns per program: 64 consecutive bytes of bfloat16


@triton.jit
def rows(source, x, n, length, BLOCK: tl.constexpr):
    """Give each row of ``source`` the l2 norm ``length`` and write it to ``x``."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        entries = tl.load(source + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        squares += entries * entries
    scale = length / tl.sqrt(tl.sum(squares, 0))
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        entries = tl.load(source + row * n + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x + row * n + at, (entries * scale).to(x.dtype.element_ty), mask=at < n)


@triton.jit
def columns(x, m, n, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Give each column of ``x`` the l2 norm ``length``, in place."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, m, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < m)[:, None] & (col < n)[None, :]
        at = row[:, None] * n + col[None, :]
        entries = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        squares += entries * entries
    scale = length / tl.sqrt(tl.sum(squares, 0))
    for first in range(0, m, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < m)[:, None] & (col < n)[None, :]
        at = row[:, None] * n + col[None, :]
        entries = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, (entries * scale[None, :]).to(x.dtype.element_ty), mask=inside)
