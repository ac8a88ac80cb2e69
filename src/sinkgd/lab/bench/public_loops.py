"""SinkGD as public code writes it, to be timed against: the plain loop, and the compiled one.

Shapes, everywhere in this file:
    m: rows; n: columns
    x: the iterate ``(..., m, n)``, a matrix that each half of an iteration makes anew
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

Update = Callable[[Tensor, Tensor, Tensor], None]  # (param, grad, lr)


def naive_loop(grad: Tensor, num_iters: int) -> Tensor:
    """Divide rows by their lengths, then columns by theirs, ``num_iters`` times, in plain torch.

    Lengths are taken by ``torch.linalg.vector_norm`` along either axis, and every division makes a
    fresh matrix: this is what the public optimizer classes do.
    """
    m, n = grad.shape[-2:]
    x = grad
    for _ in range(num_iters):
        x = x * (n**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        x = x * (m**0.5 / torch.linalg.vector_norm(x, dim=-2, keepdim=True))
    return x


def compiled_update(num_iters: int) -> Update:
    """Return the compiled step of the fastest public code, one compilation a shape.

    The loop is unrolled, lengths are float32, and the iterate is rounded to the gradient's type
    after every half iteration, as in axolotl's ``sinkgd``. The learning rate is a tensor, so that
    a schedule compiles nothing anew. What was compiled before is forgotten: torch compiles a
    function for a few shapes and types only, and these are to be the next workload's.
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
    """Return the step that `naive_loop` makes."""

    def update(param: Tensor, grad: Tensor, lr: Tensor) -> None:
        param.add_(naive_loop(grad, num_iters), alpha=-float(lr))

    return update


class PublicSinkGD(Optimizer):
    """A stateless optimizer that calls ``update`` on one parameter after the other."""

    def __init__(self, params: Iterable[Tensor], update: Update, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.update = update
        self.lr = torch.tensor(
            lr, dtype=torch.float32, device="cpu"
        )  # on the CPU, so that reading it never waits for a GPU

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
    """Say why ``torch.compile`` cannot make the compiled loop here; None where it can."""
    probe = torch.ones(2, 2, dtype=torch.float32, device="cpu")
    try:
        compiled_update(1)(
            probe.clone(), probe, torch.tensor(0.1, dtype=torch.float32, device="cpu")
        )
    except RuntimeError as error:  # what dynamo and inductor raise; the compiler's words are in it
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"torch.compile failed: {words[0]} {words[1] if len(words) > 1 else ''}".strip()
    return None
