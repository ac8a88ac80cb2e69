"""The optimizers whose time and memory `sinkgd bench` measures, most with a floor.

A pass is one read or one write of all the matrices. A floor is the time of the smallest number of
passes that an optimizer needs. AdamW reads the gradients G, the weights W and two moments, and
writes W and both moments. SGD reads G and W, and writes W. SinkGD reads G once in each of L
iterations, then reads G and W, and writes W; with deflation it reads G two more times.

SinkGD is also timed as public code writes it: the plain loop and the compiled one.

Shapes of the public loops:
    m: rows; n: columns
    x: the iterate ``(..., m, n)``, a matrix that each half iteration creates anew
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

import sinkgd
from sinkgd import kernels
from sinkgd.lab.bench.workloads import Problem, Workload
from sinkgd.optim.param_groups import DEFLATED_RANK

Update = Callable[[Tensor, Tensor, Tensor], None]  # (param, grad, lr)


def naive_loop(grad: Tensor, num_iters: int) -> Tensor:
    """Scale rows to length √n, then columns to length √m, ``num_iters`` times, in plain torch.

    This is what the public optimizer classes do: ``torch.linalg.vector_norm`` along either axis,
    and a new matrix for every scaling.
    """
    m, n = grad.shape[-2:]
    x = grad
    for _ in range(num_iters):
        x = x * (n**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        x = x * (m**0.5 / torch.linalg.vector_norm(x, dim=-2, keepdim=True))
    return x


def compiled_update(num_iters: int) -> Update:
    """Return the compiled step of the fastest public code, with one compilation for each shape.

    As in axolotl's ``sinkgd``, the loop is unrolled, lengths are float32, and the iterate is
    rounded to the gradient's type after every half iteration. The learning rate is a tensor, so a
    schedule does not recompile. Earlier compilations are discarded, because torch compiles a
    function for only a few shapes and types, and the next workload needs others.
    """
    torch.compiler.reset()

    def update(param: Tensor, grad: Tensor, lr: Tensor) -> None:
        m, n = grad.shape[-2:]
        x = grad
        for _ in range(num_iters):
            for dim, length in ((-1, n**0.5), (-2, m**0.5)):
                found = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
                x = x * (length / found).to(x.dtype)
        param.copy_(param.float() - lr * x.float())

    return torch.compile(update, fullgraph=True, dynamic=False)


def naive_update(num_iters: int) -> Update:
    """Return the optimizer step that uses `naive_loop`."""

    def update(param: Tensor, grad: Tensor, lr: Tensor) -> None:
        param.add_(naive_loop(grad, num_iters), alpha=-float(lr))

    return update


class PublicSinkGD(Optimizer):
    """A stateless optimizer that calls ``update`` on each parameter in turn."""

    def __init__(self, params: Iterable[Tensor], update: Update, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.update = update
        # On the CPU, so that reading it never waits for a GPU.
        self.lr = torch.tensor(lr, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "a timed step takes no closure"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, self.lr)


@cache
def compiler_missing() -> str | None:
    """Return why ``torch.compile`` cannot compile the loop here, or None if it can."""
    probe = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    try:
        compiled_update(1)(
            probe.clone(), probe, torch.tensor(0.1, dtype=torch.float32, device="cpu")
        )
    except RuntimeError as error:  # dynamo or inductor raises it, with the compiler's message
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"torch.compile failed: {words[0]} {words[1] if len(words) > 1 else ''}".strip()
    return None


ADAMW = "adamw-fused"  # the optimizer with which all others are compared
ITERATIONS = (5, 1)  # values of L with which SinkGD is timed; the public loops use the first
LR = 1e-3
_ADAMW_PASSES, _SGD_PASSES, _DEFLATION_PASSES = 7, 3, 2


@dataclass(frozen=True)
class Contender:
    """An optimizer, and what must be known before it runs."""

    name: str
    title: str  # the name in tables and charts
    build: Callable[[Problem], Optimizer]
    copies: int = 0  # memory besides parameters and gradients, in multiples of the parameters
    floor_bytes: Callable[[Problem], int] | None = None  # fewest bytes that a step moves, if known
    streams: bool = False  # whether it moves only floor_bytes, so that its time gives a bandwidth
    slow: bool = False  # whether it takes many times as long as AdamW
    absent: Callable[[], str | None] = lambda: None  # returns why it cannot run here, or None


def contenders(workload: Workload, device: torch.device) -> list[Contender]:
    """List all optimizers for a workload, AdamW first, including those that cannot run here."""
    if workload.model is not None:
        return [_adamw_fused(), _adamw_foreach(), *_hybrids(device)]
    iterations = ITERATIONS[0]
    return [
        _adamw_fused(),
        _adamw_foreach(),
        Contender(
            "sgd-fused",
            "SGD fused",
            lambda p: torch.optim.SGD(p.params, lr=LR, fused=True),
            floor_bytes=_passes(_SGD_PASSES),
            streams=True,
        ),
        Contender(
            "muon",
            "Muon",
            lambda p: torch.optim.Muon(p.params, lr=LR, adjust_lr_fn="match_rms_adamw"),
            copies=1,
            slow=True,
            absent=lambda: None if hasattr(torch.optim, "Muon") else "this torch has no Muon",
        ),
        Contender(
            "naive-loop",
            "public loop",
            lambda p: PublicSinkGD(p.params, naive_update(iterations), LR),
            slow=True,
        ),
        Contender(
            "compiled-loop",
            "public, compiled",
            lambda p: PublicSinkGD(p.params, compiled_update(iterations), LR),
            slow=True,
            absent=compiler_missing,
        ),
        *_sinkgds(device),
        *_whitened(),
    ]


def our_name(backend: str, iterations: int) -> str:
    """Return the name of SinkGD with a backend and a number of iterations.

    >>> our_name("cpu", 5), our_name("cpu", 1)
    ('sinkgd-cpu', 'sinkgd-cpu-L1')
    """
    suffix = "" if iterations == ITERATIONS[0] else f"-L{iterations}"
    return f"sinkgd-{backend}{suffix}"


def hybrid_name(backend: str) -> str:
    """Return the name of the hybrid: SinkGD updates hidden matrices, and AdamW the rest."""
    return f"hybrid-{backend}"


def _adamw_fused() -> Contender:
    return Contender(
        ADAMW,
        "AdamW fused",
        lambda p: torch.optim.AdamW(p.params, lr=LR, fused=True),
        copies=2,
        floor_bytes=_passes(_ADAMW_PASSES),
        streams=True,
    )


def _adamw_foreach() -> Contender:
    return Contender(
        "adamw-foreach",
        "AdamW foreach",
        lambda p: torch.optim.AdamW(p.params, lr=LR, foreach=True),
        copies=3,  # two for the state, one for temporaries
        floor_bytes=_passes(_ADAMW_PASSES),
    )


def _sinkgds(device: torch.device) -> Iterator[Contender]:
    for backend, reason in backends(device):
        for iterations in ITERATIONS:
            yield Contender(
                our_name(backend, iterations),
                f"SinkGD {backend} L={iterations}",
                _builder(_matrix_groups, backend, iterations),
                floor_bytes=_passes(iterations + _SGD_PASSES),
                slow=backend == "eager",
                absent=_constant(reason),
            )


def _whitened() -> tuple[Contender, ...]:
    """Return the optimizers that equalize singular values: the few largest, or all of them."""
    return (
        Contender(
            "deflated",
            f"SinkGD deflated, {DEFLATED_RANK} directions",
            lambda p: sinkgd.SinkGD(_matrix_groups(p), deflated_rank=DEFLATED_RANK),
            floor_bytes=_passes(ITERATIONS[0] + _DEFLATION_PASSES + _SGD_PASSES),
        ),
        Contender(
            "swan",
            "SWAN",
            lambda p: sinkgd.SWAN(p.params, lr=LR),
            copies=2,
            slow=True,
        ),
    )


def _hybrids(device: torch.device) -> Iterator[Contender]:
    for backend, reason in backends(device):
        yield Contender(
            hybrid_name(backend),
            f"SinkGD {backend} + AdamW",
            _builder(_hybrid_groups, backend, ITERATIONS[0]),
            copies=2,
            floor_bytes=_hybrid_floor,
            absent=_constant(reason),
        )


def backends(device: torch.device) -> list[tuple[str, str | None]]:
    """List every backend with the reason why ``"auto"`` cannot choose it on ``device``, or None."""
    return [(name, None if runs else reason) for name, runs, reason in kernels.describe(device)]


def _builder(
    groups: Callable[[Problem], list[dict[str, object]]], backend: str, iterations: int
) -> Callable[[Problem], Optimizer]:
    return lambda problem: sinkgd.SinkGD(
        groups(problem), sinkhorn_iterations=iterations, backend=backend
    )


def _matrix_groups(problem: Problem) -> list[dict[str, object]]:
    return [{"params": problem.params, "algorithm": "sinkgd", "lr": LR}]


def _hybrid_groups(problem: Problem) -> list[dict[str, object]]:
    assert problem.model is not None, "the hybrid needs a model to split"
    return sinkgd.param_groups(problem.model, lr=LR, deflated_rank=0)


def _hybrid_floor(problem: Problem) -> int:
    total = 0
    for group in _hybrid_groups(problem):
        passes = _ADAMW_PASSES if group["algorithm"] == "adamw" else ITERATIONS[0] + _SGD_PASSES
        params = group["params"]
        assert isinstance(params, list)
        total += passes * sum(p.numel() * p.element_size() for _, p in params)
    return total


def _passes(count: int) -> Callable[[Problem], int]:
    return lambda problem: count * problem.bytes


def _constant(reason: str | None) -> Callable[[], str | None]:
    return lambda: reason
