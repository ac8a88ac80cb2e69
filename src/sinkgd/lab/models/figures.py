"""Figures of a model's inner workings: what a block says of itself, and their summary.

Letters, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    a: attention heads
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Figures = dict[str, Tensor]  # by name, one value a head, or one alone


def attention_entropy(logits: Tensor) -> Tensor:
    r"""Return the entropy of causal attention, the mean over queries.

    .. math::
        H = -\frac1t \sum_{i} \sum_{j \le i} p_{ij} \ln p_{ij}, \qquad p_i = \mathrm{softmax}(s_i)

    The first query sees one token, so its entropy is 0; that of query i is at most ln i.

    Args:
        logits: Logits before the mask, ``(..., t, t)``, queries by keys.

    Returns:
        Nats, ``(...)``, in float32.

    Examples:
        >>> attention_entropy(torch.zeros(2, 2))  # half of ln 2: the first query has no choice
        tensor(0.3466)
    """
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    weights = logits.float().masked_fill(future, -torch.inf).softmax(-1)
    entropies: Tensor = torch.special.entr(weights).sum(-1)
    return entropies.mean(-1)


def reciprocity(scores: Tensor) -> Tensor:
    """Return the correlation of what i seeks in j with what j seeks in i.

    It is Pearson's, between the scores below the diagonal, ``S[i, j]`` with j < i, and their mirror
    images ``S[j, i]``: 1 where scores are symmetric, -1 where they are antisymmetric around their
    means, near 0 where the two directions have nothing to do with each other, and 0 where there is
    nothing to correlate.

    Args:
        scores: ``(..., t, t)``, before mask and softmax.

    Returns:
        ``(...)``, from -1 to 1, in float32.

    Examples:
        >>> reciprocity(torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]))
        tensor(1.0000)
    """
    t = scores.shape[-1]
    i, j = torch.tril_indices(t, t, offset=-1, device=scores.device)
    ahead, back = scores.float()[..., i, j], scores.float()[..., j, i]
    ahead, back = ahead - ahead.mean(-1, keepdim=True), back - back.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(ahead, back, dim=-1)


def summarize(blocks: Sequence[Figures]) -> dict[str, float]:
    """Return mean, min and max of every figure over all blocks, and the mean of each block.

    Args:
        blocks: The figures of each block, under the same names.

    Examples:
        >>> summary = summarize([{"gate": torch.tensor([0.0, 1.0])}, {"gate": torch.tensor([5.0])}])
        >>> summary["gate/block_0"], summary["gate/min"], summary["gate/mean"], summary["gate/max"]
        (0.5, 0.0, 2.0, 5.0)
    """
    summary: dict[str, float] = {}
    for name in blocks[0]:
        every = torch.cat([figures[name].float().flatten() for figures in blocks])
        summary[f"{name}/mean"] = every.mean().item()
        summary[f"{name}/min"] = every.min().item()
        summary[f"{name}/max"] = every.max().item()
        for number, figures in enumerate(blocks):
            summary[f"{name}/block_{number}"] = figures[name].float().mean().item()
    return summary
