"""The methods of this package, with their costs, and the list of all methods.

`Method` explains the fields and the letters.
"""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.lab.options import suggest
from sinkgd.lab.plan.baselines import BASELINES
from sinkgd.lab.plan.method import ITERATIONS, Method, Sums
from sinkgd.lab.recorded_names import GONE
from sinkgd.lab.train.config import ConfigError
from sinkgd.optim.param_groups import DEFLATED_RANK

MOMENTUM_RANK = 16  # of low-rank momentum: as many directions as deflation follows


def _whitening(short: int, long: int) -> float:
    return 5 * 4.0 * short**2 * long  # as the docstring of `sinkgd.SWAN` says


def _deflation(short: int, long: int) -> float:
    # As the docstring of `sinkgd.deflation.deflate` says.
    return 10.0 * (DEFLATED_RANK + 1) * short * long


def _low_rank_momentum(short: int, long: int) -> float:
    return 3 * 2.0 * MOMENTUM_RANK * short * long  # P Qᵀ, M Q and Mᵀ U


# Of `sinkgd.optim.transforms.low_rank_momentum`: M Q, its Gram matrix, Mᵀ U, and the squares of the
# lengths of its columns.
_LOW_RANK_SUMS = (
    Sums("columns", lambda x: x.m * x.r),
    Sums("rows", lambda x: x.r * x.r),
    Sums("rows", lambda x: x.n * x.r),
    Sums("columns", lambda x: x.r),
)

# Of `sinkgd.optim.transforms.operator_norm`: X v; Xᵀ u and the square of u; the square of Xᵀ u.
_OPERATOR_NORM_SUMS = (
    Sums("columns", lambda x: x.m),
    Sums("rows", lambda x: x.n + 1),
    Sums("columns", lambda _: 1),
)

FAMILY = (
    Method(
        "sinkgd",
        "SinkGD",
        "2 per entry of embedding, head, norms",
        f"sinkgd.SinkGD(param_groups(model)), {DEFLATED_RANK} directions deflated; no paper",
        can_release=True,
        exchange="vectors",
        # Deflation adds 11: storing the update takes 4, its norm 1, four products with it 4, and
        # lowering its directions 2.
        passes=ITERATIONS + 3 + 11,
        directions=DEFLATED_RANK,
        flops=_deflation,
    ),
    Method(
        "sinkgd-paper",
        "SinkGD as in the paper",
        "2 per entry of embedding, head, norms",
        "Scetbon et al. 2025, https://arxiv.org/abs/2502.06742",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
    ),
    Method(
        "sinkgd-8bit",
        "SinkGD, 8-bit Adam",
        "2 bytes per entry of embedding, head, norms, 8 bytes per block of 256",
        "sinkgd.SinkGD(param_groups(model, state_bits=8))",
        eight_bit="rest",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3 + 11,  # as "sinkgd"
        directions=DEFLATED_RANK,
        flops=_deflation,
    ),
    Method(
        "sinkgd-stateless",
        "SinkGD, stateless",
        "0",
        "sinkgd.SinkGD without groups",
        rest=0.0,
        step_counters_of="none",
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
    ),
    Method(
        "sinkgd-momentum",
        "SinkGD, momentum",
        "1 float32 per entry of matrices, 2 of embedding, head, norms",
        "sinkgd.SinkGD(momentum=...), without deflation",
        matrix=1.0,
        always_float32=True,
        can_release=True,
        exchange="vectors",
        flags="alone",
        passes=ITERATIONS + 9,  # the gradient is checked, copied and averaged
        scratch=1.0,
    ),
    Method(
        "sinkgd-momentum-8bit",
        "SinkGD, 8-bit momentum",
        "1 byte per entry of matrices, 2 numbers per entry of embedding, head, norms",
        'sinkgd.SinkGDVariant(momentum_place="after", momentum_bits=8), without deflation',
        matrix=0.25,
        always_float32=True,
        can_release=True,
        exchange="vectors",
        in_parts=True,
        passes=ITERATIONS + 7,  # the average is decoded, updated, copied and encoded
        scratch=2.0,
    ),
    Method(
        "sinkgd-low-rank",
        "SinkGD, momentum of low rank",
        f"{MOMENTUM_RANK}·(m + n) float32 per matrix, 2 per entry of embedding, head, norms",
        f"sinkgd.SinkGDVariant(momentum_rank={MOMENTUM_RANK}), without deflation",
        column=float(MOMENTUM_RANK),
        row=float(MOMENTUM_RANK),
        can_release=True,
        exchange="vectors",
        sums=_LOW_RANK_SUMS,
        flags="shared",
        in_parts=True,
        memory_rank=MOMENTUM_RANK,
        passes=ITERATIONS + 12,  # the gradient is checked, copied, averaged, and multiplied twice
        scratch=1.0,
        flops=_low_rank_momentum,
    ),
    Method(
        "sinkgd-cross-fit",
        "SinkGD, scales from half of the batch",
        "m + n float32 per matrix until the step, 2 per entry of embedding, head, norms",
        "sinkgd.SinkGDVariant(cross_fit=True), without deflation; hold_out() and the step together",
        column=1.0,
        row=1.0,
        can_release=True,
        least_micro_batches=2,
        exchange="vectors",
        iterations=2 * ITERATIONS,
        # A sum of logarithms, a sum of squares, and how many there are of each.
        sums=2 * (Sums("sides", lambda _: 2),),
        passes=2 * ITERATIONS + 3,
    ),
    Method(
        "sinkgd-averaged-scales",
        "SinkGD, averaged scales",
        "m + n float32 per matrix, 2 per entry of embedding, head, norms",
        "sinkgd.SinkGDVariant(averaged_scales=...), without deflation",
        column=1.0,
        row=1.0,
        can_release=True,
        exchange="vectors",
        sums=(Sums("columns", lambda _: 2),),  # logarithms of the column scales, and their number
        passes=ITERATIONS + 3,
    ),
    Method(
        "sinkgd-kept",
        "SinkGD, directions kept",
        f"{DEFLATED_RANK + 1}·n float32 per matrix, 2 per entry of embedding, head, norms",
        f'sinkgd.SinkGDVariant(deflated_start="kept"), {DEFLATED_RANK} directions deflated',
        column=float(DEFLATED_RANK + 1),
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3 + 11,  # as "sinkgd"
        directions=DEFLATED_RANK,
        keeps_directions=True,
        flops=_deflation,
    ),
    Method(
        "sinkgd-pinned",
        "SinkGD, operator norm",
        "n float32 per matrix, 2 per entry of embedding, head, norms",
        "sinkgd.SinkGDVariant(operator_norm=...), without deflation",
        column=1.0,
        can_release=True,
        exchange="vectors",
        sums=_OPERATOR_NORM_SUMS,
        passes=ITERATIONS + 5,  # two products with a vector
    ),
    Method(
        "sinkgd-projected",
        "SinkGD, rows orthogonal to the weight",
        "2 per entry of embedding, head, norms",
        "sinkgd.SinkGDVariant(weight_projection=True), without deflation",
        can_release=True,
        exchange="vectors",
        sums=(Sums("columns", lambda x: 3 * x.m),),  # three products of each row
        passes=ITERATIONS + 25,  # 3 as for SGD, 4 make the update, 13 its products, 5 project it
        copies=1,
        scratch=2.0,  # the weight's rows in units of their length, and a product
    ),
    Method(
        "sinkgd-constant-norm",
        "SinkGD, constant norm",
        "1 float32 per matrix, 2 per entry of embedding, head, norms",
        "sinkgd.SinkGDVariant(constant_norm=True), without deflation",
        each=1,
        can_release=True,
        exchange="vectors",
        # Three products of each matrix, added up over one side after the other.
        sums=(Sums("columns", lambda _: 3), Sums("rows", lambda _: 3)),
        passes=ITERATIONS + 25,  # as "sinkgd-projected"
        copies=1,
        scratch=2.0,
    ),
    Method(
        "sinkgd-table",
        "SinkGD, table mode",
        "1 float32 per entry of embedding and head, 2 of norms",
        'sinkgd.param_groups(..., overrides=...) with the algorithm "sinkgd-table"',
        embedding=lambda short, long: float(short * long),
        always_float32=True,
        step_counters_of="vectors",
        everywhere=True,
        can_release=True,
        exchange="vectors",
        passes=ITERATIONS + 3,
        scratch=2.0,  # the direction of an embedding, and its inputs
    ),
    Method(
        "sron",
        "SRON",
        "2 per entry of embedding, head, norms",
        "Wen et al., https://openreview.net/forum?id=BtQLBWr6zI",
        can_release=True,
        exchange="rows",
        passes=5,
        scratch=2.0,  # the update and its inputs
        batched=True,
    ),
    Method(
        "scale",
        "SCALE",
        "1 float32 per entry of the head, 2 of norms",
        "Glentis et al. 2025, https://arxiv.org/abs/2506.16659",
        embedding=lambda short, long: float(short * long),
        always_float32=True,
        head_only=True,
        step_counters_of="vectors",
        everywhere=True,
        can_release=True,
        exchange="rows",
        passes=5,
        scratch=2.0,  # as for SRON
        batched=True,
    ),
    Method(
        "swan",
        "SWAN",
        "2 per entry of embedding, head, norms",
        "Ma et al. 2024, https://arxiv.org/abs/2412.13148",
        can_release=True,
        exchange="matrices",
        passes=5,
        scratch=3.0,  # see sinkgd.optim.methods.multi_normalized
        batched=True,
        flops=_whitening,
    ),
    Method(
        "spam",
        "SPAM",
        "2 per entry",
        "Huang et al. 2025, https://arxiv.org/abs/2501.06842",
        matrix=2.0,
        step_counters_of="all",
        counters=2,  # steps and resets
        everywhere=True,
        can_release=True,
        passes=20,  # 7 for AdamW and 13 for clipping: sinkgd.contrib.spam.clip_spikes
        scratch=3.0,  # the limit, its negative and the clipped gradient
    ),
    Method(
        "adamw-spam",
        "AdamWSPAM",
        "3 per entry",
        "sinkgd.AdamWSPAM; torch.optim.AdamW with amsgrad=True",
        matrix=3.0,
        rest=3.0,
        step_counters_of="all",
        counters=2,
        everywhere=True,
        passes=12,  # 9 for AMSGrad, 1 for the norm, 2 for the clipped copy
        scratch=1.0,
    ),
)


METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (*FAMILY, *BASELINES)}
)


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: If there is no such method; the message gives the nearest name, or
            the new name of a renamed method.
    """
    if name in GONE:
        raise ConfigError(f"optimizer is {name!r}; it is called {GONE[name]!r} now")
    if name not in METHODS:
        raise ConfigError(f"optimizer is {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]
