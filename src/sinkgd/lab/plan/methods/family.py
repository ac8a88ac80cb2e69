"""This package's own methods."""

from sinkgd.lab.plan.methods.method import ITERATIONS, Method


def _whitening(short: int, long: int) -> float:
    return 5 * 4.0 * short**2 * long  # `sinkgd.SWAN`'s docstring


FAMILY = (
    Method(
        "sinkgd",
        "SinkGD",
        "2 an entry of embedding, head, norms",
        "Scetbon et al. 2025, https://arxiv.org/abs/2502.06742",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
    ),
    Method(
        "sinkgd-stateless",
        "SinkGD, stateless",
        "0",
        "sinkgd.SinkGD without groups",
        rest=0.0,
        counted="none",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
    ),
    Method(
        "swan",
        "SWAN",
        "2 an entry of embedding, head, norms",
        "Ma et al. 2024, https://arxiv.org/abs/2412.13148",
        can_release=True,
        exchange="matrices",
        passes=5,
        scratch=3.0,  # sinkgd.optim.algorithms.batches.MATRICES_IN_USE
        flops=_whitening,
    ),
)
