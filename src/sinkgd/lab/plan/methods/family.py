"""This package's own methods."""

from sinkgd.lab.plan.methods.method import ITERATIONS, Method
from sinkgd.optim.param_groups import DEFLATED_RANK


def _whitening(short: int, long: int) -> float:
    return 5 * 4.0 * short**2 * long  # `sinkgd.SWAN`'s docstring


def _deflation(short: int, long: int) -> float:
    return 10.0 * (DEFLATED_RANK + 1) * short * long  # `sinkgd.deflation.deflate`'s docstring


FAMILY = (
    Method(
        "sinkgd",
        "SinkGD",
        "2 an entry of embedding, head, norms",
        f"sinkgd.SinkGD(param_groups(model)), {DEFLATED_RANK} directions deflated; no paper",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3 + 11,  # X made 4, its length 1, four products 4, lowered 2
        directions=DEFLATED_RANK,
        flops=_deflation,
    ),
    Method(
        "sinkgd-paper",
        "SinkGD as in the paper",
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
        "sinkgd-momentum",
        "SinkGD, momentum",
        "1 float32 an entry of matrices, 2 of embedding, head, norms",
        "sinkgd.SinkGD(momentum=...), without deflation",
        matrix=1.0,
        wide=True,
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 9,  # the gradient is looked through, copied and averaged
        scratch=1.0,
    ),
    Method(
        "sinkgd-pinned",
        "SinkGD, operator norm",
        "n float32 a matrix, 2 an entry of embedding, head, norms",
        "sinkgd.SinkGD(operator_norm=...), without deflation",
        column=1.0,
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 5,  # two products with a vector
    ),
    Method(
        "sinkgd-table",
        "SinkGD, table mode",
        "1 float32 an entry of embedding and head, 2 of norms",
        'sinkgd.param_groups(..., overrides=...) with the algorithm "sinkgd-table"',
        table=lambda short, long: float(short * long),
        wide=True,
        counted="vectors",
        everywhere=True,
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
        scratch=2.0,  # a table's direction, and what that is made of
    ),
    Method(
        "sron",
        "SRON",
        "2 an entry of embedding, head, norms",
        "Wen et al., https://openreview.net/forum?id=BtQLBWr6zI",
        can_release=True,
        exchange="rows",
        passes=5,
        scratch=2.0,  # the update and what it is made of
        batched=True,
    ),
    Method(
        "scale",
        "SCALE",
        "1 float32 an entry of the head, 2 of norms",
        "Glentis et al. 2025, https://arxiv.org/abs/2506.16659",
        table=lambda short, long: float(short * long),
        wide=True,
        head_alone=True,
        counted="vectors",
        everywhere=True,
        can_release=True,
        exchange="rows",
        passes=5,
        scratch=2.0,  # as SRON's
        batched=True,
    ),
    Method(
        "swan",
        "SWAN",
        "2 an entry of embedding, head, norms",
        "Ma et al. 2024, https://arxiv.org/abs/2412.13148",
        can_release=True,
        exchange="matrices",
        passes=5,
        scratch=3.0,  # sinkgd.optim.methods.multi_normalized
        batched=True,
        flops=_whitening,
    ),
    Method(
        "spam",
        "SPAM",
        "2 an entry",
        "Huang et al. 2025, https://arxiv.org/abs/2501.06842",
        matrix=2.0,
        counted="all",
        counts=2,  # steps and resets
        everywhere=True,
        can_release=True,
        passes=20,  # AdamW's 7; what is cut: sinkgd.contrib.spam.clip_spikes
        scratch=3.0,  # the limit, its negative and the cut gradient
    ),
    Method(
        "adamw-spam",
        "AdamWSPAM",
        "3 an entry",
        "sinkgd.AdamWSPAM; torch.optim.AdamW with amsgrad=True",
        matrix=3.0,
        rest=3.0,
        counted="all",
        counts=2,
        everywhere=True,
        passes=12,  # AMSGrad's 9, the norm's 1, the clipped copy's 2
        scratch=1.0,
    ),
)
