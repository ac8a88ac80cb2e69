"""Steps against float64: dtypes, layouts, sizes, NaN, rounding, TF32, autocast, streams."""

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

import sinkgd
from contact.items import Item, Row, Section, Setting, need_gpu, patient
from sinkgd.kernels import select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
ITERATIONS, RANK = 5, 15
ROWS = 4096  # rows of a matrix that are compared in float64 at a time


def section(*, tiny: bool) -> Section:
    """Return the section."""
    sizes = ((61, 40), (200, 33)) if tiny else ((128_256, 8192), (32_769, 65_537))
    items = [
        *(Item(f"layout {name}", _Layout(lay)) for name, lay in LAYOUTS.items()),
        Item("deflated", deflated),
        Item("weighted sums of shards", weighted_sums),
        Item("nan and inf", non_finite),
        Item("stochastic rounding", stochastic),
        Item("tf32", tf32),
        Item("autocast", autocast),
        Item("side stream", side_stream),
        *(Item(f"size {m}×{n}", _Size(m, n)) for m, n in sizes),
    ]
    return Section("checks", 60, patient(items), at_once=6, timed=False)


def reference_scales(grad: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """Return r ``(..., m, 1)`` and c ``(..., 1, n)`` in float64, by the two matrix products.

    Every iteration sets r² = n / (S c²) and c² = m / (Sᵀ r²), where S is the squared gradient.
    """
    *batch, m, n = grad.shape
    c2 = torch.ones(*batch, 1, n, dtype=torch.float64, device=grad.device)
    for _ in range(num_iters):
        columns = torch.zeros_like(c2)
        pieces = []
        for rows in grad.split(ROWS, dim=-2):  # type: ignore[no-untyped-call]
            squares = rows.double().square()
            r2 = n / (squares * c2).sum(-1, keepdim=True)
            columns += squares.mul_(r2).sum(-2, keepdim=True)
            pieces.append(r2)
        c2 = m / columns
    return torch.cat(pieces, dim=-2).sqrt(), c2.sqrt()


def relative_error(found: Tensor, grad: Tensor, row: Tensor, col: Tensor) -> float:
    """Return ‖found − r G c‖ / ‖r G c‖, in float64, some rows at a time."""
    over = under = 0.0
    pieces = [x.split(ROWS, dim=-2) for x in (found, grad, row)]  # type: ignore[no-untyped-call]
    for some, rows, scales in zip(*pieces, strict=True):
        expected = rows.double() * scales * col
        over += float((some.double() - expected).square().sum())
        under += float(expected.square().sum())
    return float((over / under) ** 0.5)


def stepped(grad: Tensor, backend: str = "auto", **options: object) -> Tensor:
    """Return the update that a step writes for one gradient: minus the parameter, which was 0."""
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    groups = [{"params": [param], "algorithm": "sinkgd", **options}]
    sinkgd.SinkGD(groups, lr=1.0, backend=backend).step()
    return -param.detach()


def _contiguous(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _sliced(x: Tensor) -> Tensor:
    *batch, m, n = x.shape
    return x.new_zeros(*batch, m + 3, n + 8)[..., 1:-2, 8:].copy_(x)


def _odd(x: Tensor) -> Tensor:
    *batch, m, n = x.shape
    return x.new_zeros(*batch, m, n + 1)[..., :-1].copy_(x)


def _batch(x: Tensor) -> Tensor:
    return torch.stack([x, 3 * x.flip(-1), x.roll(1, -2)])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "odd leading dimension": _odd,
    "3-D": _batch,
}


def _draw(setting: Setting, dtype: torch.dtype, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator(device=setting.device).manual_seed(seed)
    x = torch.empty(shape, dtype=torch.float32, device=setting.device)
    x.normal_(generator=generator)
    if x.numel() < 1 << 28:  # rows and columns of very different lengths
        x *= torch.logspace(-2, 2, shape[0], dtype=torch.float32, device=x.device)[:, None]
        x *= torch.logspace(1, -1, shape[1], dtype=torch.float32, device=x.device)[None, :]
    return x.to(dtype)


def _shapes(setting: Setting) -> tuple[tuple[int, int], ...]:
    return ((24, 40),) if setting.tiny else ((512, 1376), (2048, 5461), (263, 257))


class _Layout:
    def __init__(self, lay: Callable[[Tensor], Tensor]) -> None:
        self.lay = lay

    def __call__(self, setting: Setting) -> Iterator[Row]:
        for dtype in DTYPES:
            for shape in _shapes(setting):
                grad = self.lay(_draw(setting, dtype, shape))
                found = stepped(grad)
                error = relative_error(found, grad, *reference_scales(grad, ITERATIONS))
                yield _judged(error, ROUNDING[dtype], dtype=str(dtype), shape=list(grad.shape))


def _judged(error: float, bound: float, **values: object) -> Row:
    status = "ok" if error <= bound else "wrong"  # NaN is wrong
    return {"status": status, "relative_error": error, "bound": bound, **values}


class _Size:
    def __init__(self, m: int, n: int) -> None:
        self.m, self.n = m, n

    def __call__(self, setting: Setting) -> Iterator[Row]:
        grad = _draw(setting, torch.bfloat16, (self.m, self.n))
        found = stepped(grad)
        error = relative_error(found, grad, *reference_scales(grad, ITERATIONS))
        entries = prod(grad.shape)
        yield _judged(error, ROUNDING[grad.dtype], entries=entries, over_2_31=entries > 1 << 31)


def deflated(setting: Setting) -> Iterator[Row]:
    """Compare the deflated step with the library's own in float64, on the plain backend."""
    for dtype in DTYPES:
        for shape in _shapes(setting):
            grad = _draw(setting, dtype, shape)
            expected = stepped(grad.double(), "eager", deflated_rank=RANK)
            found = stepped(grad, deflated_rank=RANK).double()
            error = float((found - expected).norm() / expected.norm())
            bound = max(ROUNDING[dtype], 1e-4)
            yield _judged(error, bound, dtype=str(dtype), shape=list(shape))


def weighted_sums(setting: Setting) -> Iterator[Row]:
    """Compare the row and column sums that ranks of a mesh exchange with float64 sums."""
    backend = select("auto", setting.device)
    for dtype in DTYPES:
        for name, lay in LAYOUTS.items():
            grads = [lay(_draw(setting, dtype, shape)) for shape in _shapes(setting)]
            sums = backend.sums(grads)
            for along, find in ((-1, sums.of_rows), (-2, sums.of_cols)):
                weights = [
                    torch.linspace(
                        0.5, 2, grad.shape[along], dtype=torch.float64, device=grad.device
                    )
                    .expand(*grad.shape[:-2], grad.shape[along])
                    .unsqueeze(-3 - along)
                    for grad in grads
                ]
                found = find(torch.cat([weight.flatten() for weight in weights]))
                expected = torch.cat(
                    [
                        (grad.double().square() * weight).sum(along).flatten()
                        for grad, weight in zip(grads, weights, strict=True)
                    ]
                )
                error = float(((found - expected) / expected).abs().max())
                yield _judged(error, 1e-6, dtype=str(dtype), layout=name, along=along)


def non_finite(setting: Setting) -> Iterator[Row]:
    """One bad entry leaves its parameter unchanged, and `skipped` counts it."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        for rank in (0, RANK):
            grad = _draw(setting, torch.bfloat16, _shapes(setting)[0])
            ill, good = (nn.Parameter(torch.ones_like(grad)) for _ in range(2))
            good.grad, ill.grad = grad, grad.clone()
            ill.grad[3, 5] = bad
            groups = [{"params": [("good", good), ("ill", ill)], "algorithm": "sinkgd"}]
            optimizer = sinkgd.SinkGD(groups, deflated_rank=rank, nonfinite="skip")
            optimizer.step()
            kept = bool(ill.eq(1).all()) and bool(good.ne(1).any())
            kept = kept and optimizer.skipped() == {"ill": 1}
            yield {"status": "ok" if kept else "wrong", "bad": str(bad), "deflated_rank": rank}


def stochastic(setting: Setting) -> Iterator[Row]:
    """Stochastic rounding draws the bits that the plain backend draws."""
    for shape in _shapes(setting):
        grad = _draw(setting, torch.bfloat16, shape)
        bits = {"rounding": "stochastic", "seed": 7}
        one, other = (stepped(grad, backend, **bits) for backend in ("auto", "eager"))
        differing = int((one != other).sum())
        # Scales differ by about 1e-7, so one entry in 1e5 may lie on the other side of its draw.
        status = "ok" if differing <= 1e-4 * one.numel() else "wrong"
        yield {"status": status, "differing": differing, "entries": one.numel()}


def tf32(setting: Setting) -> Iterator[Row]:
    """A step is the same whatever torch's precision of float32 products."""
    grad = _draw(setting, torch.float32, _shapes(setting)[0])
    for rank in (0, RANK):
        expected = stepped(grad, deflated_rank=rank)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            found = stepped(grad, deflated_rank=rank)
        finally:
            torch.set_float32_matmul_precision(before)
        error = float((found - expected).norm() / expected.norm())
        yield _judged(error, 1e-5, deflated_rank=rank)


def autocast(setting: Setting) -> Iterator[Row]:
    """A step inside autocast equals one outside."""
    grad = _draw(setting, torch.float32, _shapes(setting)[0])
    for backend in ("auto", "eager"):
        for rank in (0, RANK):
            expected = stepped(grad, backend, deflated_rank=rank)
            with torch.autocast(setting.device.type, torch.bfloat16):
                found = stepped(grad, backend, deflated_rank=rank)
            error = float((found - expected).norm() / expected.norm())
            yield _judged(error, 1e-5, backend=backend, deflated_rank=rank)


def side_stream(setting: Setting) -> Iterator[Row]:
    """A step on another stream gives the same bits, even right after one on the first stream."""
    need_gpu(setting)
    grad = _draw(setting, torch.bfloat16, _shapes(setting)[-1])
    for rank in (0, RANK):
        expected = stepped(grad, deflated_rank=rank)
        side = torch.cuda.Stream(setting.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(setting.device))
        with torch.cuda.stream(side):
            found = stepped(grad, deflated_rank=rank)
        torch.cuda.current_stream(setting.device).wait_stream(side)
        same = torch.equal(found, expected)
        yield {"status": "ok" if same else "wrong", "deflated_rank": rank}
