"""A linear map of low rank, kept as the product of two.

Letters, everywhere in this file:
    m: output features
    n: input features
    r: rank
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sinkgd.lab.models.draw import draw_normal, set_whole


class Factors(nn.Module):
    r"""The map :math:`x \mapsto W_u W_d\, x` without a bias, of r·(m + n) weights.

    Args:
        out_features: m.
        in_features: n.
        rank: r, at most the smaller of m and n.
        std: Standard deviation of initial weights.
        from_svd: Whether a whole matrix is drawn and factored, or each factor is drawn by itself.
    """

    def __init__(
        self, out_features: int, in_features: int, rank: int, std: float, *, from_svd: bool
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        self.std, self.from_svd = std, from_svd

    def draw(self, generator: torch.Generator) -> None:
        """Draw the weights."""
        if self.from_svd:
            whole = torch.empty(
                self.up.out_features, self.down.in_features, dtype=torch.float32, device="cpu"
            )
            draw_normal(whole, self.std, generator)
            self.approximate(whole)
        else:
            draw_normal(self.down.weight, self.std, generator)
            draw_normal(self.up.weight, self.std, generator)

    def approximate(self, weight: Tensor) -> None:
        r"""Take the best approximation of rank r, with :math:`\sqrt\Sigma` on both sides.

        .. math::
            W = U \Sigma V^\top, \qquad
            W_u = U_r \sqrt{\Sigma_r}, \quad W_d = \sqrt{\Sigma_r} V_r^\top

        so both factors begin with the same norm, and at full rank the product is the weight itself.

        Args:
            weight: ``(m, n)``, as an ``nn.Linear`` stores it.
        """
        rank = self.down.out_features
        with _one_thread():
            u, sigma, v = torch.linalg.svd(weight.float(), full_matrices=False)
        root = sigma[:rank].sqrt()
        set_whole(self.up.weight, u[:, :rank] * root)
        set_whole(self.down.weight, root.unsqueeze(1) * v[:rank])

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., m)`` of ``(..., n)``."""
        out: Tensor = self.up(self.down(x))
        return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute alone: LAPACK's sums, and so a seed's weights, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
