"""Products of updates with a few vectors by the compiled loops, straight from the gradients.

Letters: see `sinkgd.kernels.cpu.tables`. A product "along" is X V of a gradient whose rows lie in
memory one after the other, and Xᵀ Y of a turned one; the other one is "down".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sinkgd.deflation import LowRank, StoredProducts
from sinkgd.kernels.backend import Scales, Stack
from sinkgd.kernels.cpu.jobs import ProductsJob, Vectors, float32_address
from sinkgd.kernels.cpu.sources import Source, readable
from sinkgd.kernels.cpu.tables import VECTORS
from sinkgd.kernels.products import eager_products


class CpuProducts:
    """A reading of the gradients for each product, or for both; two where they are turned.

    Args:
        stacks: Of any kind; of what the loops cannot read, the updates are made.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        found = [_as_they_lie(stack) for stack in stacks]
        self._read = {i: own for i, own in enumerate(found) if own is not None}
        self._made = {
            i: eager_products([stack]) for i, stack in enumerate(stacks) if found[i] is None
        }

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each."""
        found = self._one(blocks, of_rows=True)
        return self._with_made(found, lambda i, made: made.of_rows([blocks[i]])[0])

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each."""
        found = self._one(blocks, of_rows=False)
        return self._with_made(found, lambda i, made: made.of_cols([blocks[i]])[0])

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each."""
        first, second = ProductsJob(), ProductsJob()
        for i, own in self._read.items():
            own.take(blocks[i], along=not own.turned)
            own.add_to(first, along=not own.turned, down=True)
            if own.turned:
                own.add_to(second, along=True, again=True)
        first.run()
        second.run()
        by_rows = {i: own.found(along=not own.turned) for i, own in self._read.items()}
        by_cols = {i: own.found(along=own.turned) for i, own in self._read.items()}
        made = {i: own.of_both([blocks[i]]) for i, own in self._made.items()}
        return (
            self._with_made(by_rows, lambda i, _: made[i][0][0]),
            self._with_made(by_cols, lambda i, _: made[i][1][0]),
        )

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm, found with the products along."""
        found = {i: own.square() for i, own in self._read.items()}
        return self._with_made(found, lambda _, made: made.squares()[0])

    def _one(self, blocks: Sequence[Tensor], *, of_rows: bool) -> dict[int, Tensor]:
        job = ProductsJob()
        for i, own in self._read.items():
            along = of_rows != own.turned
            own.take(blocks[i], along=along)
            own.add_to(job, along=along, down=not along)
        job.run()
        return {i: own.found(along=of_rows != own.turned) for i, own in self._read.items()}

    def _with_made(
        self, found: dict[int, Tensor], of: Callable[[int, StoredProducts], Tensor]
    ) -> list[Tensor]:
        both = found | {i: of(i, made) for i, made in self._made.items()}
        return [both[i] for i in range(len(both))]


def to_be_added(taken: LowRank) -> tuple[Tensor, Tensor]:
    """Return what is taken away as the loops add it to rows that lie in memory.

    Returns:
        ``(..., P, k)``, and ``(..., w, k, 16)`` for ``w`` times sixteen columns, the last ones
        padded with zeros; float32 without gaps.
    """
    *batch, Q, rank = taken.right.shape
    more = -Q % VECTORS
    wide = nn.functional.pad(taken.right, (0, 0, 0, more))
    wide = wide.view(*batch, (Q + more) // VECTORS, VECTORS, rank).mT
    return taken.left.neg().float().contiguous(), wide.float().contiguous()


class _Read:
    """A stack as it lies in memory, and room for its vectors and products.

    Args:
        sources: The gradients, of one form.
        scales: Theirs.
    """

    def __init__(self, sources: Sequence[Source], scales: Sequence[Scales]) -> None:
        self.sources, self.scales = sources, scales
        self.form = sources[0].form
        self.turned = self.form.turned
        self.shape = (len(sources), *sources[0].tensor.shape[:-2])
        self.count = len(sources) * len(self.form.offsets)
        self.k = 0

    def take(self, block: Tensor, *, along: bool) -> None:
        """Put vectors where they are read from, sixteen a block, the last ones zero."""
        self._make_room(block.shape[-1])
        vectors = block.reshape(self.count, *block.shape[-2:])
        if along:
            self.wide[..., : self.k] = vectors
        else:
            self.tall[..., : self.k] = vectors

    def add_to(
        self, job: ProductsJob, *, along: bool, down: bool = False, again: bool = False
    ) -> None:
        """Have products taken: along with the vectors (again: with what came down), or down."""
        wide = self.down if again else self.wide
        P, Q, width = self.form.P, self.form.Q, self.tall.shape[-1]
        number = 0
        for source, (row, col) in zip(self.sources, self.scales, strict=True):
            m, n = source.tensor.shape[-2:]
            for place in range(len(self.form.offsets)):
                vectors = Vectors(
                    blocks=width // VECTORS,
                    wide=wide.data_ptr() + 4 * number * width * Q if along else 0,
                    tall=self.tall.data_ptr() + 4 * number * P * width,
                    down=self.down.data_ptr() + 4 * number * width * Q if down else 0,
                    squares=self.squares.data_ptr() + 4 * number * P,
                )
                scales = row.data_ptr() + 4 * place * m, col.data_ptr() + 4 * place * n
                job.add(source.tensor.data_ptr(), source.form, scales, vectors, place=place)
                number += 1

    def found(self, *, along: bool) -> Tensor:
        """Return what was found ``along`` the rows in memory, or down them, in float64."""
        product = self.tall if along else self.down
        return product[..., : self.k].double().view(*self.shape, -1, self.k)

    def square(self) -> Tensor:
        """Return the square of each Frobenius norm."""
        return self.squares.double().sum(-1).view(*self.shape, 1, 1)

    def _make_room(self, k: int) -> None:
        if k == self.k:
            return
        P, Q, width = self.form.P, self.form.Q, -(-k // VECTORS) * VECTORS
        self.k = k
        self.tall = torch.zeros(self.count, P, width, dtype=torch.float32, device="cpu")
        self.wide = torch.zeros(self.count, Q, width, dtype=torch.float32, device="cpu")
        self.down = torch.empty(self.count, Q, width, dtype=torch.float32, device="cpu")
        self.squares = torch.empty(self.count, P, dtype=torch.float32, device="cpu")
        for buffer in (self.tall, self.wide, self.down, self.squares):
            float32_address(buffer)


def _as_they_lie(stack: Stack) -> _Read | None:
    """Return a stack as the loops read it; None where they cannot."""
    sources = [readable(grad) for grad in stack.grads]
    usual = all(x.dtype == torch.float32 and x.is_contiguous() for own in stack.scales for x in own)
    kept = [source for source in sources if source is not None]
    # A copy of what has gaps everywhere may lie another way than its neighbors do.
    alike = len({source.form.turned for source in kept}) == 1
    if not usual or not alike or len(kept) < len(sources):
        return None
    return _Read(kept, stack.scales)
