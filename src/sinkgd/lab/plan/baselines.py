"""The methods that are not of this package, with their costs.

`Method` explains the fields and the letters.
"""

from sinkgd.lab.plan.method import ITERATIONS, Method

LORA_RANK = 8  # of adapters, the default of PEFT
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
