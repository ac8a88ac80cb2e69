"""Products of updates with a few vectors by the kernels of `skinny_matmul`.

The vectors of all matrices lie in two tensors, those with an entry for each row of a matrix and
those with one for each column. A matrix fills whole blocks of 128 rows; zeros follow its own.

Letters: those of `sinkgd.kernels.triton.fields`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor

from sinkgd.deflation import Packed
from sinkgd.kernels.backend import Scales, Shared
from sinkgd.kernels.triton import launch
from sinkgd.kernels.triton.skinny_plan import BLOCK, ROWS, Bucket, Kind, Plan, padded

MOST = 32  # vectors of a launch


class SkinnyProducts:
    """Products of the updates of some gradients, on one device.

    Args:
        plan: Of these gradients.
        shapes: Theirs.
        on_device: Copies a tensor that does not change to the device, and keeps it.
        addresses: Of each gradient, its row scales and its column scales.
        kept: What these are the addresses of.
        shared: Vectors that gradients share, with an entry for each column, as the plan has them.
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
        self._shared = None if shared is None else on_device(shared.vectors)
        self._shapes, self._kept = shapes, kept
        self.order = sorted(range(len(shapes)), key=plan.first.__getitem__)  # of their matrices
        self._addresses = addresses
        self._matrices = on_device(plan.table)
        ends = [end // BLOCK for end in plan.ends]
        self.row_owners, self.col_owners = torch.split(self._matrices[-sum(ends) :], ends)
        self._counts = tuple(map(on_device, plan.counts))
        self.least, self.entries = on_device(plan.sides).view(2, -1, 1, 1).unbind()
        self._tensors = None if plan.tensors is None else on_device(plan.tensors)
        self._sizes = self._empty(2 * plan.matrices)
        self._squares: Tensor | None = None
        self._start("balance", plan.matrices, {}, self._sizes)

    def of_rows(self, vectors: Tensor) -> Packed:
        """Return X V of each matrix, of ``(cols, k)`` float64."""
        rows, _ = self._products(vectors, rows=True)
        return self._packed(rows, vectors.shape[-1], of_rows=True)

    def of_cols(self, vectors: Tensor) -> Packed:
        """Return Xᵀ Y of each matrix, of ``(rows, k)`` float64."""
        _, cols = self._products(vectors, cols=True)
        return self._packed(cols, vectors.shape[-1], of_rows=False)

    def of_both(self, vectors: Tensor | None = None) -> tuple[Packed, Packed]:
        """Return X V and Xᵀ X V of each matrix, with the vectors that they share for None."""
        shared = vectors is None
        given = self._shared if vectors is None else vectors
        assert given is not None, "there are none"
        rows, cols = self._products(given, shared=shared, rows=True, cols=True)
        k = given.shape[-1]
        return self._packed(rows, k, of_rows=True), self._packed(cols, k, of_rows=False)

    def squares(self) -> Tensor:
        """Return the square of each Frobenius norm, ``(matrices, 1, 1)`` float64."""
        if self._squares is None:
            none = torch.zeros(self.plan.ends[1], 1, dtype=torch.float64, device=self.device)
            self.of_rows(none)
        assert self._squares is not None
        squares = self._squares.double().view(-1, BLOCK, 1).sum(1, keepdim=True)
        return Packed(squares, self.row_owners, self._counts[0]).sums()

    def by_tensor(self, vectors: Tensor, *, of_rows: bool) -> list[Tensor]:
        """Return those of each gradient ``(..., m, n)``: ``(..., m, k)`` or ``(..., n, k)``."""
        k = vectors.shape[-1]
        sizes = []
        for i in self.order:
            *batch, m, n = self._shapes[i]
            length, count = m if of_rows else n, prod(batch)
            whole = count * padded(length)
            own = whole if batch else length
            sizes += [own, whole - own]
        parts = torch.split(vectors, sizes)[::2]
        found: dict[int, Tensor] = {}
        for i, part in zip(self.order, parts, strict=True):
            *batch, m, n = self._shapes[i]
            length = m if of_rows else n
            found[i] = part.view(*batch, -1, k)[..., :length, :] if batch else part
        return [found[i] for i in range(len(found))]

    def numbers_by_tensor(self, numbers: Tensor) -> list[Tensor]:
        """Return those of each gradient ``(..., m, n)``, of ``(matrices,)``: one or ``(...)``."""
        if self._tensors is None:
            parts: Sequence[Tensor] = numbers.unbind()
        else:
            batches = [self._shapes[i][:-2] for i in self.order]
            own = torch.split(numbers, [prod(batch) for batch in batches])
            parts = [part.view(batch) for part, batch in zip(own, batches, strict=True)]
        found = dict(zip(self.order, parts, strict=True))
        return [found[i] for i in range(len(found))]

    def all_by_tensor(self, flags: Tensor) -> list[Tensor]:
        """Return of each gradient, 0-dim, whether those of all its matrices are true."""
        if self._tensors is not None:
            bad = (~flags).double()
            flags = torch.segment_reduce(bad, "sum", lengths=self._tensors, unsafe=True) == 0
        found = dict(zip(self.order, flags.unbind(), strict=True))
        return [found[i] for i in range(len(found))]

    def _packed(self, vectors: Tensor, k: int, *, of_rows: bool) -> Packed:
        owners = self.row_owners if of_rows else self.col_owners
        blocks = vectors.view(-1, BLOCK, vectors.shape[-1])[..., :k].double()
        return Packed(blocks, owners, self._counts[0 if of_rows else 1])

    def _products(
        self, vectors: Tensor, *, shared: bool = False, rows: bool = False, cols: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Multiply: X by ``vectors`` where ``rows`` are asked for, else Xᵀ; or both in turn."""
        width = vectors.shape[-1]
        K = 16 if width <= 16 else MOST
        results = tuple(
            self._empty(end, K) if asked else self._sizes
            for end, asked in zip(self.plan.ends, (rows, cols), strict=True)
        )
        folded = {
            parts: tuple(
                self._empty(end, parts * K, dtype=_dtype(parts)) if used else self._sizes
                for end, used in zip(self.plan.ends, (cols, rows), strict=True)
            )
            for parts in {self._parts(bucket.kind) for bucket in self.plan.buckets}
        }
        squares = rows and self._squares is None
        if squares:
            self._squares = self._empty(self.plan.ends[0])
        for kind, blocks in self._runs(of_rows=not rows):
            parts = self._parts(kind)
            self._start(
                "fold", len(blocks), {"OF_ROWS": kind.turned == rows, "SHARED": shared, "K": K}
                | {"PARTS": parts},
                self.row_owners if not rows else self.col_owners,
                self._sizes, vectors, folded[parts][rows], blocks.start, width,
            )  # fmt: skip
        for bucket in self.plan.buckets:
            for of_rows in [True] * rows + [False] * cols:
                self._multiply(
                    bucket, results, folded[self._parts(bucket.kind)], K, of_rows=of_rows,
                    squares=of_rows and squares, fold=of_rows and cols,
                )  # fmt: skip
        return results[0], results[1]

    def _multiply(
        self,
        bucket: Bucket,
        results: tuple[Tensor, ...],
        folded: tuple[Tensor, ...],
        K: int,
        *,
        of_rows: bool,
        squares: bool,
        fold: bool,
    ) -> None:
        kind, blocks = bucket.kind, bucket.rows if of_rows else bucket.cols
        along = of_rows != kind.turned
        self._start(
            "along" if along else "down",
            len(blocks) * (BLOCK // ROWS),
            {
                **constants_of(kind, K, self._parts(kind), along=along),
                "SQUARES": squares,
                "FOLD": fold,
            },
            self.row_owners if of_rows else self.col_owners,
            self._sizes,
            folded[1 if of_rows else 0],
            results[0 if of_rows else 1],
            folded[0] if fold else self._sizes,
            self._squares if squares else self._sizes,
            blocks.start,
            1.0,
        )

    def _runs(self, *, of_rows: bool) -> list[tuple[Kind, range]]:
        """Return the blocks of buckets that lie alike and follow each other, as one."""
        runs: list[tuple[Kind, range]] = []
        for kind, rows, cols in self.plan.buckets:
            blocks = rows if of_rows else cols
            if runs and _alike(runs[-1][0], kind):
                runs[-1] = kind, range(runs[-1][1].start, blocks.stop)
            else:
                runs.append((kind, blocks))
        return runs

    def _parts(self, kind: Kind) -> int:
        return parts_of(kind.dtype, tf32=launch.multiplies_tf32(self.device))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def _start(
        self, name: str, programs: int, constants: Mapping[str, object], *arguments: object
    ) -> None:
        with on(self.device):
            launch.launch(
                getattr(launch.skinny_matmul(), name), programs, self._addresses, self._matrices,
                *arguments, **constants,
                **options(self.device, wide=constants.get("VECTOR") != 1),
            )  # fmt: skip


def constants_of(kind: Kind, K: int, parts: int, *, along: bool) -> dict[str, object]:
    """Return what a product is compiled for, but for what it stores beside the product."""
    wide = kind.vector > 1
    side = 64 if wide and kind.dtype.itemsize == 4 else 32
    if parts == 3:
        side = 128 if wide else 64
    return {
        "DTYPE": launch.primitives().DTYPES[kind.dtype],
        "K": K,
        "BN" if along else "BM": side,
        "PARTS": parts,
        "VECTOR": kind.vector,
    }


def parts_of(dtype: torch.dtype, *, tf32: bool) -> int:
    """Return how many numbers an entry of a vector is split into, to meet entries of ``dtype``."""
    if dtype == torch.bfloat16:
        return 3
    return 2 if tf32 else 1


def _alike(one: Kind, other: Kind) -> bool:
    return (one.dtype == torch.bfloat16, one.turned) == (
        other.dtype == torch.bfloat16,
        other.turned,
    )


def _dtype(parts: int) -> torch.dtype:
    return torch.bfloat16 if parts == 3 else torch.float32


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the one that launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def options(device: torch.device, *, wide: bool = True) -> dict[str, object]:
    """Return the compiler's options for a launch on ``device``."""
    if device.type == "cpu":
        return {}
    hip = torch.version.hip is not None
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return options_of("hip" if hip else "cuda", warp, wide=wide)


def options_of(target: str, warp: int, *, wide: bool) -> dict[str, object]:
    """Return the compiler's options, such that no kernel runs out of registers."""
    threads = 128
    if target == "hip":
        threads *= 2 if wide else 4  # so that scalar registers hold the masks of all loads
    stages = 3 if target == "cuda" else 2
    options: dict[str, object] = {"num_warps": threads // warp, "num_stages": stages}
    if target == "cuda" and not wide:
        options["maxnreg"] = 255  # without a limit the compiler spilled one at 126
    return {**options, "enable_fp_fusion": True}


def scales_are_usual(scales: Sequence[Scales], device: torch.device) -> bool:
    """Whether the kernels read scales as they are."""
    return all(
        x.dtype == torch.float32 and x.is_contiguous() and x.device == device
        for pair in scales
        for x in pair
    )
