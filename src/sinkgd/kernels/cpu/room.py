"""Room for scales: one flat tensor, whose parts become tensors when they are asked for."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Size, Tensor

from sinkgd.kernels.backend import Scales
from sinkgd.kernels.cpu.form import Form
from sinkgd.kernels.cpu.jobs import float32_address


class Room(Sequence[Scales]):
    """The scales of gradients ``(..., m, n)``, float32: of each, all rows and then all columns.

    Args:
        forms: Of the gradients; None stands for one whose scales are put here later.
        grads: The gradients.
    """

    def __init__(self, forms: Sequence[Form | None], grads: Sequence[Tensor]) -> None:
        self._grads = grads
        self._given: dict[int, Scales] = {}
        self._begins: list[tuple[int, int]] = []
        end = 0
        for form in forms:
            rows, cols = (0, 0) if form is None else (form.rows, form.cols)
            self._begins.append((end, end + rows))
            end += rows + cols
        self._flat = torch.empty(end, dtype=torch.float32, device="cpu")
        self._base = float32_address(self._flat)

    def addresses(self, i: int) -> tuple[int, int]:
        """Return where the row and the column scales of gradient ``i`` begin."""
        row, col = self._begins[i]
        return self._base + 4 * row, self._base + 4 * col

    def put(self, i: int, scales: Scales) -> None:
        """Let ``scales`` be those of gradient ``i``."""
        self._given[i] = scales

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, i: int) -> Scales: ...

    @overload
    def __getitem__(self, i: slice) -> list[Scales]: ...

    def __getitem__(self, i: int | slice) -> Scales | list[Scales]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if i in self._given:
            return self._given[i]
        *batch, m, n = self._grads[i].shape
        row, col = self._begins[i]
        return Scales(self._part(row, (*batch, m, 1)), self._part(col, (*batch, 1, n)))

    def _part(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        return self._flat[begin : begin + Size(shape).numel()].view(shape)
