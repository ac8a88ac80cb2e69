"""The list of all methods, with their costs.

`Method` explains the fields and the letters.
"""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.lab.options import suggest
from sinkgd.lab.plan.method import ITERATIONS, Method, Sums
from sinkgd.lab.recorded_names import GONE
from sinkgd.lab.train.config import ConfigError
from sinkgd.optim.param_groups import DEFLATED_RANK

LORA_RANK = 8  # of adapters, the default of PEFT
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


_SOAPS_LARGEST_SIDE = 10_000  # the largest side that has a basis, by the authors' default


def _newton_schulz_muon(short: int, long: int) -> float:
    return 5 * (4.0 * short**2 * long + 2.0 * short**3)


def _soap_state(short: int, long: int, r: int) -> float:
    del r
    sides = [side for side in (short, long) if side <= _SOAPS_LARGEST_SIDE]
    return 2.0 * short * long + sum(2.0 * side**2 for side in sides)


BASELINES = (
    Method(
        "adam",
        "Adam",
        "2 per entry",
        "torch.optim.Adam; https://arxiv.org/abs/1412.6980",
        matrix=2.0,
        step_counters_of="all",
    ),
    Method(
        "adamw",
        "AdamW",
        "2 per entry",
        "torch.optim.AdamW; https://arxiv.org/abs/1711.05101",
        matrix=2.0,
        step_counters_of="all",
    ),
    Method(
        "adamw-8bit",
        "8-bit Adam",
        "2 bytes per entry, 8 bytes per block of 256",
        "Dettmers et al. 2021, https://arxiv.org/abs/2110.02861; blocks as in bitsandbytes",
        step_counters_of="all",
        eight_bit="all",
    ),
    Method(
        "lora",
        f"LoRA, rank {LORA_RANK}",
        "2 per entry of the adapters",
        "Hu et al. 2021, https://arxiv.org/abs/2106.09685; AdamW trains adapters of all matrices "
        "in blocks",
        step_counters_of="all",
        adapter_rank=LORA_RANK,
    ),
    Method(
        "muon",
        "Muon",
        "1 per entry of matrices, 2 of the rest",
        "torch.optim.Muon; https://kellerjordan.github.io/posts/muon/",
        matrix=1.0,
        exchange="matrices",
        passes=5,
        scratch=3.0,  # 2.6 were measured: benchmarks/memory/2026-11-25.json
        flops=_newton_schulz_muon,
    ),
    Method(
        "galore",
        "GaLore",
        "r·min(m, n) + 2r·max(m, n), 2 per entry of the rest",
        "Zhao et al. 2024, https://arxiv.org/abs/2403.03507, table 1",
        low_rank=lambda short, long, r: r * (short + 2.0 * long),
        step_counters_of="none",
        exchange="matrices",
        passes=5,
        scratch=2.0,  # the update, projected back, and its copy: assumed
    ),
    Method(
        "fira",
        "Fira",
        "as GaLore, and a norm for each matrix",
        "Chen et al. 2024, https://arxiv.org/abs/2410.01623",
        low_rank=lambda short, long, r: r * (short + 2.0 * long) + 1,
        step_counters_of="none",
        exchange="matrices",
        passes=9,
        scratch=3.0,  # as for GaLore, and the gradient outside the projection: assumed
    ),
    Method(
        "apollo",
        "APOLLO",
        "2r·max(m, n) + 2, 2 per entry of the rest",
        "Zhu et al. 2024, https://arxiv.org/abs/2412.05270, table 1",
        low_rank=lambda short, long, r: 2.0 * r * long + 2 + 0 * short,
        exchange="projections",
        passes=5,
        scratch=2.0,  # as for GaLore
    ),
    Method(
        "apollo-mini",
        "APOLLO-Mini",
        "2·max(m, n) + 2, 2 per entry of the rest",
        "Zhu et al. 2024, https://arxiv.org/abs/2412.05270, at rank 1",
        low_rank=lambda short, long, r: 2.0 * long + 2 + 0 * r * short,
        exchange="projections",
        passes=5,
        scratch=2.0,
    ),
    Method(
        "racs",
        "RACS",
        "m + n + 1, 2 per entry of the rest",
        "Gong et al. 2025, https://arxiv.org/abs/2502.07752",
        low_rank=lambda short, long, r: short + long + 1.0 + 0 * r,
        exchange="vectors",
        passes=2 * ITERATIONS + 5,
        scratch=4.0,  # squares, the same divided by the largest, the update, the limited update
    ),
    Method(
        "stable-spam",
        "Stable-SPAM",
        "2 per entry, 3 per parameter",
        "Huang et al. 2025, https://arxiv.org/abs/2502.17055",
        matrix=2.0,
        scalars=3,
        step_counters_of="none",
        everywhere=True,
        passes=13,
        scratch=2.0,  # absolute values and the mask of clipped entries, or the denominator: assumed
    ),
    Method(
        "adafactor",
        "Adafactor",
        "m + n per matrix, 1 per entry of a vector, 1 per parameter",
        "Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, without momentum",
        low_rank=lambda short, long, r: short + long + 0.0 * r,
        embedding=lambda short, long: 0.0 + short + long,
        rest=1.0,
        scalars=1,  # the RMS of the weights, which pytorch-optimizer keeps although it is not used
        step_counters_of="none",
        everywhere=True,
        exchange="vectors",
        iterations=1,
        passes=9,
        scratch=1.0,  # the squares, which the update overwrites
    ),
    Method(
        "lion",
        "Lion",
        "1 per entry",
        "Chen et al. 2023, https://arxiv.org/abs/2302.06675",
        matrix=1.0,
        rest=1.0,
        step_counters_of="none",
        everywhere=True,
        passes=5,
        scratch=1.0,  # the update
    ),
    Method(
        "soap",
        "SOAP",
        "2·m·n + 2·m² + 2·n²; embedding, head: 2·(m + n)·min(m, n); vectors: 2 per entry",
        "Vyas et al. 2024, https://arxiv.org/abs/2409.11321; sides above 10,000 have no basis",
        low_rank=_soap_state,
        embedding=lambda short, long: 2.0 * short * (short + long),
        step_counters_of="none",
        exchange="matrices",
        everywhere=True,
        passes=12,
        scratch=6.0,  # three products and their inputs: assumed
        flops=lambda short, long: 8.0 * short * long * (short + long),  # four pairs of products
    ),
    Method(
        "sgd-momentum",
        "SGD, momentum",
        "1 per entry",
        "torch.optim.SGD",
        matrix=1.0,
        rest=1.0,
        step_counters_of="none",
        passes=5,
    ),
    Method(
        "sgd",
        "SGD",
        "0",
        "torch.optim.SGD without momentum: the least memory",
        rest=0.0,
        step_counters_of="none",
        passes=3,
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
