r"""The parts of a Lens block: attention with mixed logits, factored weights, and the MLP.

Attention's logits are a mixture of three terms, with separate gates for each head. With
:math:`S = QK^\top/\sqrt D` over all tokens, before the causal mask, the logits of a head are

.. math::
    w_{std}\, S + w_{rec}\, S^\top + w_{disc}\, d, \qquad
    d_j = \langle k_j, u \rangle - \tfrac1t \sum_l \langle k_l, u \rangle

where :math:`w` is the softmax of three learned gates and u is a learned direction. Reciprocity,
:math:`S^\top_{ij} = q_j \cdot k_i/\sqrt D`, scores token i by the query of token j.
Discoverability, :math:`d_j`, scores token j for all queries alike.

Attention stays causal. For j ≤ i the transpose reads only the query of j and the key of i. The mean
in :math:`d_j` includes later tokens, but it is the same number for every j, and a softmax over j is
invariant to it. So this mean is left out here; the other terms are one product of wider queries and
keys,

.. math::
    \big[\, w_{std}\, q_i + \sqrt D\, w_{disc}\, u,\;\; w_{rec}\, k_i \,\big] \cdot
    \big[\, k_j,\;\; q_j \,\big] / \sqrt D

so the usual attention kernels apply.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size
    a: attention heads
    d: features of a head, D in the formulas
    m, n, r: output features, input features and rank of a factored weight
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from sinkgd.lab.models.gpt2 import Conv1D, GPT2BaseConfig
from sinkgd.lab.models.language_model import (
    Statistics,
    attention_entropy,
    draw_normal,
    reciprocity,
    set_weight,
)


class Factors(nn.Module):
    r"""The map :math:`x \mapsto W_u W_d\, x` without a bias, of r·(m + n) weights.

    Args:
        out_features: m.
        in_features: n.
        rank: r, at most the smaller of m and n.
        std: Standard deviation of initial weights.
        from_svd: Draw a whole matrix and factor it; otherwise draw each factor by itself.
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
        r"""Set the factors to the best approximation of rank r, with :math:`\sqrt\Sigma` in both.

        .. math::
            W = U \Sigma V^\top, \qquad
            W_u = U_r \sqrt{\Sigma_r}, \quad W_d = \sqrt{\Sigma_r} V_r^\top

        so both factors have the same norm, and at full rank the product is the weight itself.

        Args:
            weight: ``(m, n)``, as an ``nn.Linear`` stores it.
        """
        rank = self.down.out_features
        with _one_thread():
            u, sigma, v = torch.linalg.svd(weight.float(), full_matrices=False)
        root = sigma[:rank].sqrt()
        set_weight(self.up.weight, u[:, :rank] * root)
        set_weight(self.down.weight, root.unsqueeze(1) * v[:rank])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., n)`` to ``(..., m)``."""
        out: Tensor = self.up(self.down(x))
        return out


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, because LAPACK's sums depend on the number of threads.

    Otherwise the weights of a seed would depend on this number, too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Initial gates of standard, reciprocity and discoverability; their softmax is 0.76, 0.15, 0.09.
_GATES = (2.2, 0.6, 0.1)
_KINDS = ("standard", "reciprocity", "discoverability")
_DIRECTION_STD = 0.02


class LensAttention(nn.Module):
    """Causal multi-head self-attention with mixed logits and factored keys and values.

    Args:
        config: The sizes.
        rank: Rank of the maps to keys and to values.
    """

    def __init__(self, config: GPT2BaseConfig, rank: int) -> None:
        super().__init__()
        h, std = config.hidden_size, config.initializer_std
        self.head_size = config.head_size
        self.query = Conv1D(h, h, std)
        self.key = Factors(h, h, rank, std, from_svd=True)
        self.value = Factors(h, h, rank, std, from_svd=True)
        self.c_proj = Conv1D(h, h, config.residual_std)
        # Gates and directions are vectors, so they get no weight decay. The standard gates of all
        # heads come first.
        self.gates = nn.Parameter(torch.empty(len(_GATES) * config.num_heads, dtype=torch.float32))
        self.direction = nn.Parameter(torch.empty(h, dtype=torch.float32))

    def draw(self, generator: torch.Generator) -> None:
        """Draw the directions and set the gates; submodules draw the other weights."""
        heads = self.gates.numel() // len(_GATES)
        gates = torch.tensor(_GATES, dtype=torch.float32, device="cpu")
        set_weight(self.gates, gates.repeat_interleave(heads))
        draw_normal(self.direction, _DIRECTION_STD, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map the normalized hidden states ``(b, t, h)`` to ``(b, t, h)``."""
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        v = self._heads(self.value(x))
        queries, keys = self._widened(q, k)
        # fused kernels need values as wide as queries and keys
        values = pad(v, (0, self.head_size))
        scale = self.head_size**-0.5
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        out: Tensor = self.c_proj(mixed[..., : self.head_size].transpose(1, 2).flatten(2))
        return out

    def mixture(self) -> Tensor:
        """Return the weights of standard, reciprocity and discoverability, ``(3, a)``, float32."""
        return torch.softmax(self.gates.float().view(len(_GATES), -1), 0)

    def statistics(self, x: Tensor) -> Statistics:
        """Return statistics of each head on the normalized hidden states ``(b, t, h)``.

        Returns:
            ``attention_entropy`` in nats and ``reciprocity``, the correlation of S and its
            transpose, both means over the sequences; ``gate_standard``, ``gate_reciprocity`` and
            ``gate_discoverability``, the mixture. Each is ``(a,)``.
        """
        entropies, correlations = [], []
        for row in torch.split(x, 1):  # one sequence at a time, since logits are t×t
            q, k = self._heads(self.query(row)), self._heads(self.key(row))
            queries, keys = self._widened(q, k)
            entropies.append(attention_entropy(queries @ keys.mT / self.head_size**0.5))
            correlations.append(reciprocity(q @ k.mT))
        mixture = zip(_KINDS, self.mixture(), strict=True)
        return {
            "attention_entropy": torch.cat(entropies).mean(0),
            "reciprocity": torch.cat(correlations).mean(0),
            **{f"gate_{kind}": weights for kind, weights in mixture},
        }

    def _widened(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys ``(b, a, t, 2d)`` whose products are √d times the mixed logits.

        Args:
            q: Queries, ``(b, a, t, d)``.
            k: Keys, ``(b, a, t, d)``.
        """
        standard, reciprocal, discoverable = self.mixture()[..., None, None]
        found = self.head_size**0.5 * discoverable * self.direction.view(-1, 1, self.head_size)
        queries = torch.cat((standard * q + found, reciprocal * k), dim=-1)
        return queries.to(q.dtype), torch.cat((k, q), dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(b, t, h)`` into ``(b, a, t, d)``."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


_SHARE = 0.1


class LensMLP(nn.Module):
    r"""A GELU MLP that also reads the output of attention, through a low-rank map.

    .. math::
        z = (1 - s)\, \mathrm{GELU}(W_1 y) + s\, W_u W_d\, \mathrm{stopgrad}(\text{attention}),
        \qquad \text{out} = W_2 z

    The share s is learned, starts at 0.1 and is clamped to [0, 1]. Outside of these bounds its
    gradient is zero, so if an optimizer moves the share out of the bounds, no gradient brings it
    back. No gradient flows through the map to attention.

    Args:
        config: The sizes.
        rank: Rank of the map from the output of attention.
    """

    def __init__(self, config: GPT2BaseConfig, rank: int) -> None:
        super().__init__()
        h, inner, std = config.hidden_size, config.intermediate_size, config.initializer_std
        self.c_fc = Conv1D(inner, h, std)
        self.context = Factors(inner, h, rank, std, from_svd=False)
        # A vector of one number, since FSDP cannot shard scalars.
        self.context_share = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.c_proj = Conv1D(h, inner, config.residual_std)

    def draw(self, generator: torch.Generator) -> None:
        """Set the share of the context; submodules draw the other weights."""
        del generator
        self.context_share.fill_(_SHARE)

    def share(self) -> Tensor:
        """Return the share s, ``(1,)``."""
        return self.context_share.clamp(0.0, 1.0)

    def forward(self, y: Tensor, attention: Tensor) -> Tensor:
        """Return ``(b, t, h)``.

        Args:
            y: Normalized hidden states, ``(b, t, h)``.
            attention: The output of attention, ``(b, t, h)``; no gradient flows to this argument.
        """
        own = nn.functional.gelu(self.c_fc(y), approximate="tanh")
        context = self.context(attention.detach())
        out: Tensor = self.c_proj(torch.lerp(own, context, self.share().to(own.dtype)))
        return out
