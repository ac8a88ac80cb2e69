"""Products of updates X = row * grad * col with a few vectors, by the kernels of `skinny_matmul`.

`SkinnyProducts` takes and returns the vectors of all matrices in one tensor; `StackProducts` takes
and returns one tensor for each stack of gradients.

Letters: as in `sinkgd.kernels.triton.tables`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor, nn

from sinkgd.deflation import Packed, StoredProducts
from sinkgd.kernels.backend import Scales, Shared, Stack
from sinkgd.kernels.eager import eager_products
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.launch import GpuTarget, kernels, multiplies_tf32
from sinkgd.kernels.triton.product_plan import BLOCK, ROWS, Bucket, Kind, Plan, padded_rows

MAX_VECTORS = 32  # vectors by which one launch multiplies


class StackProducts:
    """Products of updates with vectors, a tensor for each stack.

    Args:
        stacks: Stacks of any kind. Kernels multiply those that they can read. The updates of all
            others are stored, and multiplied by torch.
        readable: Whether the kernels can read a stack.
        build: Builds the `SkinnyProducts` of gradients, given these and their scales.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        readable: Callable[[Stack], bool],
        build: Callable[[Sequence[Tensor], Sequence[Scales]], "SkinnyProducts"],
    ) -> None:
        self._stacks = stacks
        self._stored: dict[int, StoredProducts] = {}
        by_device: dict[torch.device, list[int]] = {}
        for i, stack in enumerate(stacks):
            if readable(stack):
                by_device.setdefault(stack.grads[0].device, []).append(i)
            else:
                self._stored[i] = eager_products([stack])
        self._runs: list[tuple[list[int], SkinnyProducts]] = []
        for own in by_device.values():
            grads = [grad for i in own for grad in stacks[i].grads]
            self._runs.append((own, build(grads, [x for i in own for x in stacks[i].scales])))

    def of_rows(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return X V of each stack."""
        return self._one_side(blocks, of_rows=True)

    def of_cols(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return Xᵀ Y of each stack."""
        return self._one_side(blocks, of_rows=False)

    def of_both(self, blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return X V and Xᵀ X V of each stack."""
        if max(block.shape[-1] for block in blocks) > MAX_VECTORS:
            rows = self.of_rows(blocks)
            return rows, self.of_cols(rows)
        rows_of: dict[int, Tensor] = {}
        cols_of: dict[int, Tensor] = {}
        for own, products in self._runs:
            packed_rows, packed_cols = products.of_both(self._pack(own, products, blocks))
            rows_of |= self._unpack(own, products, packed_rows, blocks, of_rows=True)
            cols_of |= self._unpack(own, products, packed_cols, blocks, of_rows=False)
        for i, stored in self._stored.items():
            (rows_of[i],), (cols_of[i],) = stored.of_both([blocks[i]])
        return _in_order(rows_of), _in_order(cols_of)

    def squares(self) -> list[Tensor]:
        """Return the square of each Frobenius norm."""
        found = {i: stored.squares()[0] for i, stored in self._stored.items()}
        for own, products in self._runs:
            squares = products.numbers_by_tensor(products.squares().flatten())
            found |= self._by_stack(own, [x[..., None, None] for x in squares])
        return _in_order(found)

    def _one_side(self, blocks: Sequence[Tensor], *, of_rows: bool) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for own, products in self._runs:
            most = max(blocks[i].shape[-1] for i in own)
            results = []
            for first in range(0, most, MAX_VECTORS):  # more vectors take more launches
                some = [block[..., first : first + MAX_VECTORS] for block in blocks]
                vectors = self._pack(own, products, some)
                packed = products.of_rows(vectors) if of_rows else products.of_cols(vectors)
                results.append(self._unpack(own, products, packed, some, of_rows=of_rows))
            found |= {i: torch.cat([result[i] for result in results], dim=-1) for i in own}
        for i, stored in self._stored.items():
            one = [blocks[i]]
            (found[i],) = stored.of_rows(one) if of_rows else stored.of_cols(one)
        return _in_order(found)

    def _pack(self, own: list[int], products: "SkinnyProducts", blocks: Sequence[Tensor]) -> Tensor:
        """Return the vectors in the layout in which the kernels read them."""
        width = max(blocks[i].shape[-1] for i in own)
        padded: list[Tensor] = []
        for i in own:
            length, k = blocks[i].shape[-2:]
            gaps = (0, width - k, 0, padded_rows(length) - length)
            padded += nn.functional.pad(blocks[i].double(), gaps).view(len(blocks[i]), -1, width)
        return torch.cat([padded[i] for i in products.order])

    def _unpack(
        self,
        own: list[int],
        products: "SkinnyProducts",
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
        stacks = [tensors[first:end] for first, end in pairwise(ends)]
        return {i: torch.stack([*stack]) for i, stack in zip(own, stacks, strict=True)}


def _in_order(found: Mapping[int, Tensor]) -> list[Tensor]:
    return [found[i] for i in range(len(found))]


class SkinnyProducts:
    """Products of the updates of some gradients, on one device.

    Args:
        plan: The plan of products with these gradients.
        shapes: Shapes of the gradients.
        on_device: Copies a constant tensor to the device and caches the copy.
        addresses: Three for each gradient: of the gradient, of its row scales and of its column
            scales.
        kept: The tensors that have these addresses.
        shared: Vectors that several gradients share, with an entry for each column; the plan has
            the offset of each gradient in them.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Sequence[torch.Size],
        on_device: Callable[[Tensor], Tensor],
        addresses: Tensor,
        kept: object,
        shared: Shared | None = None,
    ) -> None:
        self.plan, self.device = plan, addresses.device
        self._target = launch.target_of(self.device)
        self._shared = None if shared is None else on_device(shared.vectors)
        self._shapes, self._kept = shapes, kept
        # The tensors' indices, in the order of their matrices.
        self.order = sorted(range(len(shapes)), key=plan.first.__getitem__)
        self._addresses = addresses
        self._matrices = on_device(plan.table)
        ends = [end // BLOCK for end in plan.ends]
        self.row_owners, self.col_owners = torch.split(self._matrices[-sum(ends) :], ends)
        self._counts = tuple(map(on_device, plan.counts))
        self.shorter_side, self.entries = on_device(plan.sides).view(2, -1, 1, 1).unbind()
        self._tensors = None if plan.tensors is None else on_device(plan.tensors)
        self._powers = self._empty(2 * plan.matrices)
        self._squares: Tensor | None = None
        self._launch("balance_scales", plan.matrices, {}, self._powers)

    def of_rows(self, vectors: Tensor) -> Packed:
        """Return X V of each matrix; ``vectors`` has all V, ``(cols, k)`` float64."""
        rows, _ = self._products(vectors, rows=True)
        return self._packed(rows, vectors.shape[-1], of_rows=True)

    def of_cols(self, vectors: Tensor) -> Packed:
        """Return Xᵀ Y of each matrix; ``vectors`` has all Y, ``(rows, k)`` float64."""
        _, cols = self._products(vectors, cols=True)
        return self._packed(cols, vectors.shape[-1], of_rows=False)

    def of_both(self, vectors: Tensor | None = None) -> tuple[Packed, Packed]:
        """Return X V and Xᵀ X V of each matrix; None means the vectors that the matrices share."""
        shared = vectors is None
        given = self._shared if vectors is None else vectors
        assert given is not None, "there are none"
        rows, cols = self._products(given, shared=shared, rows=True, cols=True)
        k = given.shape[-1]
        return self._packed(rows, k, of_rows=True), self._packed(cols, k, of_rows=False)

    def squares(self) -> Tensor:
        """Return the square of each Frobenius norm, ``(matrices, 1, 1)`` float64."""
        if self._squares is None:
            zeros = torch.zeros(self.plan.ends[1], 1, dtype=torch.float64, device=self.device)
            self.of_rows(zeros)
        assert self._squares is not None
        squares = self._squares.double().view(-1, BLOCK, 1).sum(1, keepdim=True)
        return Packed(squares, self.row_owners, self._counts[0]).sums()

    def by_tensor(self, vectors: Tensor, *, of_rows: bool) -> list[Tensor]:
        """Split vectors by gradient ``(..., m, n)``: into ``(..., m, k)`` or ``(..., n, k)``."""
        k = vectors.shape[-1]
        sizes = []
        for i in self.order:
            *batch, m, n = self._shapes[i]
            length, count = m if of_rows else n, prod(batch)
            whole = count * padded_rows(length)
            own = whole if batch else length
            sizes += [own, whole - own]
        parts = torch.split(vectors, sizes)[::2]
        found: dict[int, Tensor] = {}
        for i, part in zip(self.order, parts, strict=True):
            *batch, m, n = self._shapes[i]
            length = m if of_rows else n
            found[i] = part.view(*batch, -1, k)[..., :length, :] if batch else part
        return _in_order(found)

    def numbers_by_tensor(self, numbers: Tensor) -> list[Tensor]:
        """Split ``(matrices,)`` numbers by gradient: ``(...)`` for a gradient ``(..., m, n)``."""
        if self._tensors is None:
            parts: Sequence[Tensor] = numbers.unbind()
        else:
            batches = [self._shapes[i][:-2] for i in self.order]
            own = torch.split(numbers, [prod(batch) for batch in batches])
            parts = [part.view(batch) for part, batch in zip(own, batches, strict=True)]
        return _in_order(dict(zip(self.order, parts, strict=True)))

    def all_by_tensor(self, flags: Tensor) -> list[Tensor]:
        """Return a 0-dim flag for each gradient: whether the flags of all its matrices are True."""
        if self._tensors is not None:
            bad = (~flags).double()
            flags = torch.segment_reduce(bad, "sum", lengths=self._tensors, unsafe=True) == 0
        return _in_order(dict(zip(self.order, flags.unbind(), strict=True)))

    def _packed(self, vectors: Tensor, k: int, *, of_rows: bool) -> Packed:
        owners = self.row_owners if of_rows else self.col_owners
        blocks = vectors.view(-1, BLOCK, vectors.shape[-1])[..., :k].double()
        return Packed(blocks, owners, self._counts[0 if of_rows else 1])

    def _products(
        self, vectors: Tensor, *, shared: bool = False, rows: bool = False, cols: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Multiply X by ``vectors`` if ``rows`` are asked for, else Xᵀ.

        If both ``rows`` and ``cols`` are asked for, Xᵀ is then multiplied by the first product.
        """
        width = vectors.shape[-1]
        K = 16 if width <= 16 else MAX_VECTORS
        unused = self._powers  # for arguments that a kernel neither reads nor writes
        results = tuple(
            self._empty(end, K) if asked else unused
            for end, asked in zip(self.plan.ends, (rows, cols), strict=True)
        )
        scaled = {
            splits: tuple(
                self._empty(end, splits * K, dtype=_dtype(splits)) if used else unused
                for end, used in zip(self.plan.ends, (cols, rows), strict=True)
            )
            for splits in {self._splits(bucket.kind) for bucket in self.plan.buckets}
        }
        squares = rows and self._squares is None
        if squares:
            self._squares = self._empty(self.plan.ends[0])
        for kind, blocks in self._runs(of_rows=not rows):
            splits = self._splits(kind)
            self._launch(
                "scale_vectors", len(blocks),
                {"OF_ROWS": kind.transposed == rows, "SHARED": shared, "K": K, "SPLITS": splits},
                self.row_owners if not rows else self.col_owners,
                self._powers, vectors, scaled[splits][rows], blocks.start, width,
            )  # fmt: skip
        for bucket in self.plan.buckets:
            for of_rows in [True] * rows + [False] * cols:
                self._multiply(
                    bucket, results, scaled[self._splits(bucket.kind)], K, of_rows=of_rows,
                    squares=of_rows and squares, scale_result=of_rows and cols,
                )  # fmt: skip
        return results[0], results[1]

    def _multiply(
        self,
        bucket: Bucket,
        results: tuple[Tensor, ...],
        scaled: tuple[Tensor, ...],
        K: int,
        *,
        of_rows: bool,
        squares: bool,
        scale_result: bool,
    ) -> None:
        """Multiply a bucket's X, or Xᵀ, by vectors that were multiplied by their scales."""
        unused = self._powers
        kind, blocks = bucket.kind, bucket.rows if of_rows else bucket.cols
        transposed = of_rows == kind.transposed
        self._launch(
            "matmul_transposed" if transposed else "matmul",
            len(blocks) * (BLOCK // ROWS),
            {
                **constants_of(kind, K, self._splits(kind), transposed=transposed),
                "SQUARES": squares,
                "SCALE_RESULT": scale_result,
            },
            self.row_owners if of_rows else self.col_owners,
            self._powers,
            scaled[1 if of_rows else 0],
            results[0 if of_rows else 1],
            scaled[0] if scale_result else unused,
            self._squares if squares else unused,
            blocks.start,
            1.0,
        )

    def _runs(self, *, of_rows: bool) -> list[tuple[Kind, range]]:
        """Return the blocks of vectors, joined over adjacent buckets that one launch can scale."""
        runs: list[tuple[Kind, range]] = []
        for kind, rows, cols in self.plan.buckets:
            blocks = rows if of_rows else cols
            if runs and _scaled_alike(runs[-1][0], kind):
                runs[-1] = kind, range(runs[-1][1].start, blocks.stop)
            else:
                runs.append((kind, blocks))
        return runs

    def _splits(self, kind: Kind) -> int:
        return splits_of(kind.dtype, tf32=multiplies_tf32(self._target))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def _launch(
        self, name: str, programs: int, constants: Mapping[str, object], *arguments: object
    ) -> None:
        with launch.on(self.device):
            launch.launch(
                getattr(kernels("skinny_matmul"), name), programs, self._addresses, self._matrices,
                *arguments, **constants,
                **options_of(self._target, wide=constants.get("VECTOR") != 1),
            )  # fmt: skip


def constants_of(kind: Kind, K: int, splits: int, *, transposed: bool) -> dict[str, object]:
    """Return a product's compile-time constants, except those that select its extra outputs."""
    wide = kind.vector > 1
    side = 64 if wide and kind.dtype.itemsize == 4 else 32
    if splits == 3:
        side = 128 if wide else 64
    return {
        "DTYPE": kernels("primitives").DTYPES[kind.dtype],
        "K": K,
        "BM" if transposed else "BN": side,
        "SPLITS": splits,
        "VECTOR": kind.vector,
    }


def splits_of(dtype: torch.dtype, *, tf32: bool) -> int:
    """Return into how many numbers each entry of a vector is split, for gradients of ``dtype``."""
    if dtype == torch.bfloat16:
        return 3
    return 2 if tf32 else 1


def _scaled_alike(one: Kind, other: Kind) -> bool:
    same_splits = (one.dtype == torch.bfloat16) == (other.dtype == torch.bfloat16)
    return same_splits and one.transposed == other.transposed


def _dtype(splits: int) -> torch.dtype:
    return torch.bfloat16 if splits == 3 else torch.float32


def options_of(target: GpuTarget | None, *, wide: bool = True) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers."""
    if target is None:
        return {}
    threads = 128
    if target.backend == "hip":
        threads *= 2 if wide else 4  # so that scalar registers hold the masks of all loads
    stages = 3 if target.backend == "cuda" else 2
    options: dict[str, object] = {"num_warps": threads // target.warp, "num_stages": stages}
    if target.backend == "cuda" and not wide:
        # Without this option, the compiler used 126 registers for one of the kernels, and spilled.
        options["maxnreg"] = 255
    return {**options, "enable_fp_fusion": True}
