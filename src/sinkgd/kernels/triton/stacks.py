"""Products of the updates of stacks with a few vectors, each stack's in a tensor of its own."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from sinkgd.deflation import Packed, StoredProducts
from sinkgd.kernels.backend import Scales, Stack
from sinkgd.kernels.products import eager_products
from sinkgd.kernels.triton.products import MOST, SkinnyProducts
from sinkgd.kernels.triton.skinny_plan import padded


class StackProducts:
    """Products of the updates of stacks, by kernels where these read what there is.

    Args:
        stacks: Of any kind; of what the kernels do not read, the updates are made.
        readable: Whether the kernels read a stack.
        start: Makes the products of gradients with their scales.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        readable: Callable[[Stack], bool],
        start: Callable[[Sequence[Tensor], Sequence[Scales]], SkinnyProducts],
    ) -> None:
        self._stacks = stacks
        self._made: dict[int, StoredProducts] = {}
        by_device: dict[torch.device, list[int]] = {}
        for i, stack in enumerate(stacks):
            if readable(stack):
                by_device.setdefault(stack.grads[0].device, []).append(i)
            else:
                self._made[i] = eager_products([stack])
        self._runs: list[tuple[list[int], SkinnyProducts]] = []
        for own in by_device.values():
            grads = [grad for i in own for grad in stacks[i].grads]
            self._runs.append((own, start(grads, [x for i in own for x in stacks[i].scales])))

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each."""
        return self._one(blocks, of_rows=True)

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each."""
        return self._one(blocks, of_rows=False)

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each."""
        if max(block.shape[-1] for block in blocks) > MOST:
            along = self.of_rows(blocks)
            return along, self.of_cols(along)
        rows_of: dict[int, Tensor] = {}
        cols_of: dict[int, Tensor] = {}
        for own, products in self._runs:
            rows, cols = products.of_both(self._pack(own, products, blocks))
            rows_of |= self._unpack(own, products, rows, blocks, of_rows=True)
            cols_of |= self._unpack(own, products, cols, blocks, of_rows=False)
        for i, made in self._made.items():
            (rows_of[i],), (cols_of[i],) = made.of_both([blocks[i]])
        return _in_order(rows_of), _in_order(cols_of)

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm."""
        found = {i: made.squares()[0] for i, made in self._made.items()}
        for own, products in self._runs:
            squares = products.numbers_by_tensor(products.squares().flatten())
            found |= self._by_stack(own, [x[..., None, None] for x in squares])
        return _in_order(found)

    def _one(self, blocks: Sequence[Tensor], *, of_rows: bool) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for own, products in self._runs:
            most = max(blocks[i].shape[-1] for i in own)
            parts = []
            for first in range(0, most, MOST):  # more vectors take more launches
                some = [block[..., first : first + MOST] for block in blocks]
                vectors = self._pack(own, products, some)
                packed = products.of_rows(vectors) if of_rows else products.of_cols(vectors)
                parts.append(self._unpack(own, products, packed, some, of_rows=of_rows))
            found |= {i: torch.cat([part[i] for part in parts], dim=-1) for i in own}
        for i, made in self._made.items():
            (found[i],) = made.of_rows([blocks[i]]) if of_rows else made.of_cols([blocks[i]])
        return _in_order(found)

    def _pack(self, own: list[int], products: SkinnyProducts, blocks: Sequence[Tensor]) -> Tensor:
        """Put vectors where the kernels read them."""
        width = max(blocks[i].shape[-1] for i in own)
        padded_: list[Tensor] = []
        for i in own:
            length, k = blocks[i].shape[-2:]
            gaps = (0, width - k, 0, padded(length) - length)
            padded_ += nn.functional.pad(blocks[i].double(), gaps).view(len(blocks[i]), -1, width)
        return torch.cat([padded_[i] for i in products.order])

    def _unpack(
        self,
        own: list[int],
        products: SkinnyProducts,
        packed: Packed,
        blocks: Sequence[Tensor],
        *,
        of_rows: bool,
    ) -> dict[int, Tensor]:
        tensors = products.by_tensor(packed.blocks.flatten(0, 1), of_rows=of_rows)
        found = self._by_stack(own, tensors)
        return {i: x[..., : blocks[i].shape[-1]] for i, x in found.items()}

    def _by_stack(self, own: list[int], tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        ends = list(accumulate((len(self._stacks[i].grads) for i in own), initial=0))
        parts = [tensors[first:end] for first, end in pairwise(ends)]
        return {i: torch.stack([*part]) for i, part in zip(own, parts, strict=True)}


def _in_order(found: dict[int, Tensor]) -> list[Tensor]:
    return [found[i] for i in range(len(found))]
