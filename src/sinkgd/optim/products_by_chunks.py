"""Multiply updates by vectors chunk by chunk, if copies of all would take too much memory."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from sinkgd.kernels import Backend, Stack


class ProductsByChunks:
    """The `sinkgd.deflation.Products` of updates, computed chunk by chunk.

    Each product calls the backend anew for every chunk, so only one chunk is copied at a time.

    Args:
        backend: The backend, which may copy what it multiplies.
        chunks: Chunks of stacks.
    """

    def __init__(self, backend: Backend, chunks: Sequence[Sequence[Stack]]) -> None:
        self._backend, self._chunks = backend, chunks
        self._squares: list[Tensor] = []

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each stack."""
        return [
            found
            for chunk, own in zip(self._chunks, self._split(blocks), strict=True)
            for found in self._backend.products(chunk).of_rows(own)
        ]

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each stack."""
        squares: list[Tensor] = []
        found: list[Tensor] = []
        for chunk, own in zip(self._chunks, self._split(blocks), strict=True):
            products = self._backend.products(chunk)
            found += products.of_cols(own)
            if not self._squares:
                # squares() needs a call of of_rows, too. No result of this call is used, so it gets
                # zeros.
                products.of_rows([_zeros(stack, y) for stack, y in zip(chunk, own, strict=True)])
                squares += products.squares()
        self._squares = self._squares or squares
        return found

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each stack."""
        rows: list[Tensor] = []
        cols: list[Tensor] = []
        squares: list[Tensor] = []
        for chunk, own in zip(self._chunks, self._split(blocks), strict=True):
            products = self._backend.products(chunk)
            both = products.of_both(own)
            rows += both[0]
            cols += both[1]
            squares += products.squares()
        self._squares = squares
        return rows, cols

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm."""
        return self._squares

    def _split(self, blocks: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        first = 0
        for chunk in self._chunks:
            yield blocks[first : first + len(chunk)]
            first += len(chunk)


def _zeros(stack: Stack, y: Tensor) -> Tensor:
    """Return zeros ``(..., n, k)`` to multiply X by, given the ``y`` that multiplies Xᵀ."""
    return y.new_zeros(*y.shape[:-2], stack.grads[0].shape[-1], y.shape[-1])
