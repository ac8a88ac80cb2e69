"""Products of gradients with vectors, by the compiled loops.

`CpuProducts` multiplies updates X = row * grad * col by a few vectors, for deflation. `CpuSums`
multiplies the squares of gradients by one vector of weights, for sharded gradients and lengths of
rows.

Letters: see `sinkgd.kernels.cpu.tables`. A product "by rows" yields one number per vector
for each row in memory: X V, or Xᵀ Y if the layout is transposed. The other product is "by columns".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sinkgd.deflation import LowRank, StoredProducts
from sinkgd.kernels.backend import Scales, Stack
from sinkgd.kernels.cpu.layout import Input, float32_address, readable
from sinkgd.kernels.cpu.tables import VECTORS, ProductsTable, SumsTable, Vectors
from sinkgd.kernels.eager import EagerSums, eager_products

# A float32 sum may have lost terms of up to 2^-126, each times its weight; see `FLOOR` in `solve`.
_FLOOR = 2.0**-100
_SMALLEST = 2.0**-126


class CpuProducts:
    """Products of updates, each by one pass over the gradients.

    `of_both` also takes one pass, or two if the gradients are transposed.

    Args:
        stacks: Stacks of any kind. If the loops cannot read the gradients of a stack, its updates
            are computed and stored.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        found = [_stack_product(stack) for stack in stacks]
        self._read = {i: own for i, own in enumerate(found) if own is not None}
        self._stored = {
            i: eager_products([stack]) for i, stack in enumerate(stacks) if found[i] is None
        }

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each stack."""
        found = self._one(blocks, of_rows=True)
        return self._with_stored(found, lambda i, stored: stored.of_rows([blocks[i]])[0])

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each stack."""
        found = self._one(blocks, of_rows=False)
        return self._with_stored(found, lambda i, stored: stored.of_cols([blocks[i]])[0])

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each stack."""
        first, second = ProductsTable(), ProductsTable()
        for i, own in self._read.items():
            own.put(blocks[i], by_rows=not own.transposed)
            own.add_to(first, by_rows=not own.transposed, by_columns=True)
            if own.transposed:
                own.add_to(second, by_rows=True, again=True)
        first.run()
        second.run()
        of_rows = {i: own.product(by_rows=not own.transposed) for i, own in self._read.items()}
        of_cols = {i: own.product(by_rows=own.transposed) for i, own in self._read.items()}
        both = {i: own.of_both([blocks[i]]) for i, own in self._stored.items()}
        return (
            self._with_stored(of_rows, lambda i, _: both[i][0][0]),
            self._with_stored(of_cols, lambda i, _: both[i][1][0]),
        )

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm, as an earlier product by rows computed it."""
        found = {i: own.square() for i, own in self._read.items()}
        return self._with_stored(found, lambda _, stored: stored.squares()[0])

    def _one(self, blocks: Sequence[Tensor], *, of_rows: bool) -> dict[int, Tensor]:
        table = ProductsTable()
        for i, own in self._read.items():
            by_rows = of_rows != own.transposed
            own.put(blocks[i], by_rows=by_rows)
            own.add_to(table, by_rows=by_rows, by_columns=not by_rows)
        table.run()
        return {i: own.product(by_rows=of_rows != own.transposed) for i, own in self._read.items()}

    def _with_stored(
        self, found: dict[int, Tensor], of: Callable[[int, StoredProducts], Tensor]
    ) -> list[Tensor]:
        both = found | {i: of(i, stored) for i, stored in self._stored.items()}
        return [both[i] for i in range(len(both))]


def low_rank_factors(correction: LowRank) -> tuple[Tensor, Tensor]:
    """Return the factors of a negated low-rank matrix, which the loops add to rows in memory.

    Returns:
        The left factor ``(..., P, k)``, and the right one as ``(..., Q/16, k, 16)``, padded with
        zeros; contiguous float32.
    """
    *batch, Q, rank = correction.right.shape
    more = -Q % VECTORS
    right = nn.functional.pad(correction.right, (0, 0, 0, more))
    right = right.view(*batch, (Q + more) // VECTORS, VECTORS, rank).mT
    return correction.left.neg().float().contiguous(), right.float().contiguous()


class _StackProduct:
    """The products of one stack, with buffers for its vectors.

    Args:
        inputs: The gradients, of one layout.
        scales: The scales of the gradients.
    """

    def __init__(self, inputs: Sequence[Input], scales: Sequence[Scales]) -> None:
        self.inputs, self.scales = inputs, scales
        self.layout = inputs[0].layout
        self.transposed = self.layout.transposed
        self.shape = (len(inputs), *inputs[0].tensor.shape[:-2])
        self.count = len(inputs) * len(self.layout.offsets)
        self.k = 0

    def put(self, block: Tensor, *, by_rows: bool) -> None:
        """Copy the vectors to the loops' buffer, padded with zeros to blocks of sixteen."""
        self._allocate(block.shape[-1])
        vectors = block.reshape(self.count, *block.shape[-2:])
        if by_rows:
            self.col_vectors[..., : self.k] = vectors
        else:
            self.row_vectors[..., : self.k] = vectors

    def add_to(
        self, table: ProductsTable, *, by_rows: bool, by_columns: bool = False, again: bool = False
    ) -> None:
        """Add the matrices to a table.

        Args:
            table: The table.
            by_rows: Whether products by rows are computed, with the vectors given to `put`.
            by_columns: Whether products by columns are computed.
            again: Whether products by rows use the products by columns as their vectors, instead
                of those given to `put`.
        """
        given = self.col_products if again else self.col_vectors
        P, Q, width = self.layout.P, self.layout.Q, self.row_vectors.shape[-1]
        number = 0
        for source, (row, col) in zip(self.inputs, self.scales, strict=True):
            m, n = source.tensor.shape[-2:]
            for i in range(len(self.layout.offsets)):
                to_cols, to_rows = 4 * number * width * Q, 4 * number * P * width
                vectors = Vectors(
                    blocks=width // VECTORS,
                    col_vectors=given.data_ptr() + to_cols if by_rows else 0,
                    row_vectors=self.row_vectors.data_ptr() + to_rows,
                    col_products=self.col_products.data_ptr() + to_cols if by_columns else 0,
                    squares=self.squares.data_ptr() + 4 * number * P,
                )
                scales = row.data_ptr() + 4 * i * m, col.data_ptr() + 4 * i * n
                table.add(source.tensor.data_ptr(), source.layout, scales, vectors, i=i)
                number += 1

    def product(self, *, by_rows: bool) -> Tensor:
        """Return a product in float64."""
        product = self.row_vectors if by_rows else self.col_products
        return product[..., : self.k].double().view(*self.shape, -1, self.k)

    def square(self) -> Tensor:
        """Return the square of each Frobenius norm."""
        return self.squares.double().sum(-1).view(*self.shape, 1, 1)

    def _allocate(self, k: int) -> None:
        if k == self.k:
            return
        P, Q, width = self.layout.P, self.layout.Q, -(-k // VECTORS) * VECTORS
        self.k = k
        self.row_vectors = torch.zeros(self.count, P, width, dtype=torch.float32, device="cpu")
        self.col_vectors = torch.zeros(self.count, Q, width, dtype=torch.float32, device="cpu")
        self.col_products = torch.empty(self.count, Q, width, dtype=torch.float32, device="cpu")
        self.squares = torch.empty(self.count, P, dtype=torch.float32, device="cpu")
        for buffer in (self.row_vectors, self.col_vectors, self.col_products, self.squares):
            float32_address(buffer)


def _stack_product(stack: Stack) -> _StackProduct | None:
    """Return the products of a stack; None if the loops cannot read it."""
    inputs = [readable(grad) for grad in stack.grads]
    usual = all(x.dtype == torch.float32 and x.is_contiguous() for own in stack.scales for x in own)
    kept = [source for source in inputs if source is not None]
    # A gradient with neither dense rows nor dense columns was copied, and the copy may have another
    # order in memory than the other gradients.
    alike = len({source.layout.transposed for source in kept}) == 1
    if not usual or not alike or len(kept) < len(inputs):
        return None
    return _StackProduct(kept, stack.scales)


class CpuSums:
    """Weighted sums of squares, each by one pass over the gradients.

    The loops sum in float32. That is not enough for a gradient whose squares leave float32's range,
    or that has a zero row or column. Once a call shows this, `EagerSums` sums that gradient in this
    call and in all later ones.

    Args:
        grads: ``(..., m, n)``, of any kind.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._grads = grads
        self._inputs = [readable(grad) for grad in grads]
        self._rows = [grad.shape[:-1].numel() for grad in grads]
        self._cols = [grad.mT.shape[:-1].numel() for grad in grads]
        self._others: dict[int, EagerSums] = {}  # by the index of the gradient
        for i, source in enumerate(self._inputs):
            if source is None:
                self._leave(i)
        self._of_rows = torch.zeros(sum(self._rows), dtype=torch.float32, device="cpu")
        self._of_cols = torch.zeros(sum(self._cols), dtype=torch.float32, device="cpu")
        self._row_sums = self._table(
            self._of_cols, self._cols, self._of_rows, self._rows, rows=True
        )
        self._col_sums = self._table(
            self._of_rows, self._rows, self._of_cols, self._cols, rows=False
        )

    def of_rows(self, weights: Tensor) -> Tensor:
        """Return G² c² of each gradient."""
        self._of_cols.copy_(weights)
        self._row_sums.run()
        lengths = self._cols, self._rows
        return self._checked(weights, self._of_cols, self._of_rows, lengths, EagerSums.of_rows)

    def of_cols(self, weights: Tensor) -> Tensor:
        """Return (G²)ᵀ r² of each gradient."""
        self._of_rows.copy_(weights)
        self._col_sums.run()
        lengths = self._rows, self._cols
        return self._checked(weights, self._of_rows, self._of_cols, lengths, EagerSums.of_cols)

    def _table(
        self, weights: Tensor, read: list[int], sums: Tensor, written: list[int], *, rows: bool
    ) -> SumsTable:
        table = SumsTable()
        at, to = float32_address(weights), float32_address(sums)
        for source, num_weights, num_sums in zip(self._inputs, read, written, strict=True):
            if source is not None:
                table.add(source.tensor.data_ptr(), source.layout, at, to, rows=rows)
            at += 4 * num_weights
            to += 4 * num_sums
        return table

    def _checked(
        self,
        weights: Tensor,
        narrow: Tensor,
        sums: Tensor,
        lengths: tuple[list[int], list[int]],
        of: Callable[[EagerSums, Tensor], Tensor],
    ) -> Tensor:
        """Return sums in float64. Gradients for which float32 is not enough are summed again.

        Args:
            weights: The weights, float64.
            narrow: The weights in float32.
            sums: The sums that the loops have computed.
            lengths: Numbers of weights and of sums of each gradient.
            of: The method of `EagerSums` that sums a gradient.
        """
        read, written = lengths
        floor = _FLOOR * (1 + max(read, default=0)) * (1 + narrow.amax()) if len(narrow) else 0
        valid = (sums >= floor) & sums.isfinite()
        if not bool(valid.all()):
            for i in _indices_of_marked(~valid, written):
                self._leave(i)
        lost = (weights != 0) & ((narrow < _SMALLEST) | ~narrow.isfinite())
        if bool(lost.any()):
            for i in _indices_of_marked(lost, read):
                self._leave(i)
        wide = sums.double()
        if self._others:
            parts, own = torch.split(wide, written), torch.split(weights, read)
            for i, other in self._others.items():
                parts[i].copy_(of(other, own[i]))
        return wide

    def _leave(self, i: int) -> None:
        """Leave a gradient to `EagerSums`."""
        if i not in self._others:
            self._others[i] = EagerSums([self._grads[i]])


def _indices_of_marked(marked: Tensor, lengths: Sequence[int]) -> list[int]:
    """Split a vector into parts of these lengths; return the indices of parts with a True entry."""
    return [i for i, own in enumerate(torch.split(marked, list(lengths))) if bool(own.any())]
