"""The options of SinkGD restated in float64. It shares no code with the library.

Letters, everywhere in this file:
    G: a gradient; D: what is normalized; X: the update
    B: an average; v: the vector of a power iteration
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference import column_projection, row_projection


@dataclass
class Expected:
    """One matrix under the options of a group, step after step."""

    weight: Tensor
    lr: float = 1.0
    sinkhorn_iterations: int = 5
    momentum: float = 0.0
    nesterov: bool = False
    momentum_place: str = "before"
    momentum_bits: int = 32
    momentum_rank: int = 0
    low_rank_momentum: float = 0.95
    averaged_scales: float = 0.0
    cross_fit: bool = False
    last: str = "column"
    first: str | None = None
    tiny_rows: str = "keep"
    tiny_row_threshold: float = 0.01
    deflated_rank: int = 0
    weight_projection: bool = False
    deflated_start: str = "fixed"
    operator_norm: str | None = None
    constant_norm: bool = False
    kept: dict[str, Any] = field(default_factory=dict)

    def step(self, G: Tensor) -> Tensor:
        """Return the update X of a step along ``G``, and take the step."""
        G = G.double()
        if self.momentum and self.momentum_place == "before":
            G = self._averaged(G)
        G = self._with_memory(G)
        X = self._deflated(self._normalized(self._masked(G)))
        X = self._pinned(self._projected(X))
        if self.momentum and self.momentum_place == "after":
            X = self._averaged(X)
        self.weight = self._moved(self.weight.double(), X)
        return X

    def _averaged(self, x: Tensor) -> Tensor:
        mu, B = self.momentum, self.kept.get("B", torch.zeros_like(x))
        faded = mu * B
        B = faded + (1 - mu) * x
        self.kept["B"] = _in_a_byte(B, faded) if self.momentum_bits == 8 else B
        return mu * B + (1 - mu) * x if self.nesterov else B

    def _with_memory(self, G: Tensor) -> Tensor:
        r, mu = min(self.momentum_rank, *G.shape), self.low_rank_momentum
        if r == 0:
            return G
        memory, start = self.kept.get("memory", (torch.zeros_like(G), _fixed(r, G.shape[1]).T))
        M = mu * memory + (1 - mu) * G
        if M.any():
            P, _ = torch.linalg.qr(M @ start)
            self.kept["memory"] = P @ (P.T @ M), M.T @ P
        return M

    def _masked(self, D: Tensor) -> Tensor:
        if self.tiny_rows == "keep":
            return D
        lengths = [math.hypot(*row) for row in D.tolist()]
        mean = sum(lengths) / len(lengths)
        kept = [length >= self.tiny_row_threshold * mean for length in lengths]
        return torch.diag(torch.tensor(kept, dtype=torch.float64)) @ D

    def _normalized(self, D: Tensor) -> Tensor:
        r, c = self._scales_of(D)
        if self.cross_fit and "held" in self.kept:
            r, c = (_like(*pair) for pair in zip(self.kept.pop("held"), (r, c), strict=True))
        if self.averaged_scales and D.any():
            # Only the products r c count: the geometric mean of c is 1.
            u = _geometric_mean(c)
            return D / torch.outer(self._kept_length("a", r * u), self._kept_length("b", c / u))
        return torch.outer(r, c) * D

    def hold_out(self, G: Tensor) -> None:
        """Keep the scales of a gradient for the next step."""
        self.kept["held"] = self._scales_of(self._masked(G.double()))

    def _scales_of(self, D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of rows and of columns; 0 for those that are zero."""
        other = "row" if self.last == "column" else "column"
        order = [other, self.last] * self.sinkhorn_iterations
        if self.first == self.last:
            order = [self.last, *order]
        scales = {"row": torch.ones(len(D)).double(), "column": torch.ones(D.shape[1]).double()}
        halves, dims = {"row": row_projection, "column": column_projection}, {"row": 1, "column": 0}
        for side in order:
            before, D = D.norm(dim=dims[side]), halves[side](D)
            scales[side] = scales[side] * D.norm(dim=dims[side]) / before.where(before > 0, 1)
        return scales["row"], scales["column"]

    def _kept_length(self, name: str, scale: Tensor) -> Tensor:
        beta, now = self.averaged_scales, torch.zeros_like(scale)
        now[scale > 0] = 1 / scale[scale > 0]
        was = self.kept.get(name, torch.zeros_like(now))
        mean = (beta * was**2 + (1 - beta) * now**2).sqrt()
        self.kept[name] = torch.where(was > 0, mean, now)
        return torch.where(self.kept[name] > 0, self.kept[name], 1.0)

    def _deflated(self, X: Tensor) -> Tensor:
        m, n = X.shape
        k = min(self.deflated_rank, m - 1, n - 1)
        if k < 1 or not X.any():
            return X
        start = self.kept.get("start", _fixed(self.deflated_rank + 1, n)[: k + 1].T)
        Q, _ = torch.linalg.qr(X @ start)
        Q, _ = torch.linalg.qr(X @ (X.T @ Q))
        B = Q.T @ X
        if self.deflated_start == "kept":
            self.kept["start"] = B.T
        lengths = [float(row.norm()) for row in B]
        others = math.sqrt(max(X.norm() ** 2 - B[:k].norm() ** 2, 0) / (min(m, n) - k))
        level = max(lengths[k], others, 2.0**-6 * max(lengths))
        kept = torch.tensor([min(1.0, level / b) if b else 1.0 for b in lengths[:k]])
        X = X - Q[:, :k] @ torch.diag(1 - kept.double()) @ B[:k]
        return X * (math.sqrt(m * n) / X.norm())

    def _projected(self, X: Tensor) -> Tensor:
        if not self.weight_projection:
            return X
        rows = []
        for x, w in zip(X, self.weight.double(), strict=True):
            # The projection off all of w is that on the complement of w in the orthogonal basis
            # whose first vector is w.
            basis = torch.linalg.qr(w.unsqueeze(1), mode="complete").Q[:, int(w.any()) :]
            y = basis @ (basis.T @ x)
            rows.append(y * (math.hypot(*x) / math.hypot(*y)) if y.any() else y)
        return torch.stack(rows)

    def _moved(self, W: Tensor, X: Tensor) -> Tensor:
        """Return the weight after the step along ``X``."""
        if not self.constant_norm:
            return W - self.lr * X
        R = self.kept.setdefault("R", math.hypot(*W.flatten().tolist()))
        if R == 0 or not X.any():
            return W - self.lr * X
        # On the sphere of radius R, to where W - lr R X/|X| points.
        toward = W / R - self.lr * X / math.hypot(*X.flatten().tolist())
        return R * toward / math.hypot(*toward.flatten().tolist())

    def _pinned(self, X: Tensor) -> Tensor:
        if self.operator_norm is None:
            return X
        m, n = X.shape
        v = self.kept.get("v", torch.tensor([math.sin(j) for j in range(1, n + 1)]).double())
        u = X @ v
        w = X.T @ u
        if not X.any():
            return X
        least = math.sqrt(m if self.last == "column" else n)
        if self.weight_projection:  # which may have removed rows
            least = math.hypot(*X.flatten().tolist()) / math.sqrt(min(m, n))
        sigma = max(w.norm() / u.norm(), least)
        self.kept["v"] = w / w.norm()
        return X * ((math.sqrt(m / n) if self.operator_norm == "muon" else 1.0) / sigma)


def _geometric_mean(scales: Tensor) -> Tensor:
    found = scales[scales > 0]
    return found.log().mean().exp() if len(found) else torch.ones(()).double()


def _like(held: Tensor, own: Tensor) -> Tensor:
    """Return the step's own scales, moved towards the held ones; their mean square stays."""
    if not own.any():
        return own
    known = (held > 0) & (own > 0)
    ratio = held[known] / own[known]
    factor = torch.ones_like(own)
    factor[known] = (ratio / _geometric_mean(ratio)).clamp(0.5, 2)
    return own * factor / factor[own > 0].square().mean().sqrt()


def _in_a_byte(B: Tensor, faded: Tensor) -> Tensor:
    """Return the nearest of 4 (k/127)², with either sign, in terms of k.

    Where B is what was left of the average before, within float32's errors, return the largest that
    is not above B in absolute value.
    """
    levels = torch.tensor([4 * (k / 127) ** 2 for k in range(128)], dtype=torch.float64)
    halfway = torch.tensor([4 * ((k + 0.5) / 127) ** 2 for k in range(127)], dtype=torch.float64)
    nearest = levels[torch.bucketize(B.abs(), halfway)]
    below = levels[(torch.bucketize(B.abs(), levels, right=True) - 1).clamp(max=127)]
    has_faded = (B - faded).abs() <= 2.0**-20 * faded.abs()
    return torch.where(has_faded, below, nearest) * B.sign()


def _fixed(k: int, n: int) -> Tensor:
    """Return the k vectors of n entries with which a search for directions begins."""
    angles = [0.6180339887498949 * t * t for t in range(1, k * n + 1)]
    return torch.tensor([math.sin(a) for a in angles], dtype=torch.float64).view(k, n)
