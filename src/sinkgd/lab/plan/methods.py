"""The table of methods: what each keeps between steps, for how long, and where that is said.

Letters, everywhere in this file:
    m, n: the sides of a matrix, rows and columns
    r: the rank of a projection
    L: iterations of SR-Sinkhorn
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.config_file import nearest

ITERATIONS = 5  # L: Scetbon et al., algorithm 4

# What ranks tell each other about the matrices of which they hold pieces.
Exchange = Literal["nothing", "vectors", "matrices", "projections"]


@dataclass(frozen=True)
class Method:
    """An optimizer: what it does to the matrices of blocks; the rest is AdamW's, or its own."""

    name: str
    title: str
    formula: str  # of the state
    source: str
    matrix: float = 0.0  # numbers that an entry of a matrix keeps
    rest: float = 2.0  # that an entry outside of the matrices keeps
    # Numbers for a whole matrix instead, from its shorter and its longer side and r.
    low_rank: Callable[[int, int, int], float] | None = None
    counts: int = 0  # float32 numbers that each parameter keeps, matrices among them
    eight_bit: bool = False  # both moments in 8 bits, of all entries
    can_release: bool = False  # in `sinkgd.lab.train.recipes`, or as published
    exchange: Exchange = "nothing"
    passes: int = 7  # readings and writings of a matrix in a step
    scratch: float = 0.0  # matrices in float32 while one is updated, the largest that there is
    flops: Callable[[int, int], float] = lambda short, long: 0.0 * short * long  # of its products

    def state_bytes(self, m: int, n: int, itemsize: int, r: int) -> float:
        """Return what a matrix keeps; 8-bit Adam keeps `eight_bit_bytes` instead.

        Args:
            m: Rows, of a piece where the state is kept by entry.
            n: Columns.
            itemsize: Bytes of a weight.
            r: Rank of a projection.
        """
        if self.low_rank is not None:
            return itemsize * self.low_rank(min(m, n), max(m, n), r)
        return itemsize * self.matrix * m * n


def eight_bit_bytes(entries: int) -> float:
    """Return what 8-bit Adam keeps: two bytes an entry, two float32 for every 256 of them.

    Below 4,096 entries it keeps float32 (bitsandbytes, ``min_8bit_size``).
    """
    return 8.0 * entries if entries < 4096 else 2.0 * entries + 8.0 * entries / 256


def _newton_schulz_muon(short: int, long: int) -> float:
    return 5 * (4.0 * short**2 * long + 2.0 * short**3)


def _whitening(short: int, long: int) -> float:
    return 5 * 4.0 * short**2 * long  # `sinkgd.SWAN`'s docstring


_TABLE = (
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
    Method(
        "adamw",
        "AdamW",
        "2 an entry",
        "torch.optim.AdamW; https://arxiv.org/abs/1711.05101",
        matrix=2.0,
        counts=1,
    ),
    Method(
        "adamw-spam",
        "AdamWSPAM",
        "3 an entry",
        "sinkgd.AdamWSPAM; torch.optim.AdamW with amsgrad=True",
        matrix=3.0,
        rest=3.0,
        counts=2,  # steps and resets
        passes=12,  # AMSGrad's 9, the norm's 1, the clipped copy's 2
        scratch=1.0,
    ),
    Method(
        "spam",
        "SPAM",
        "2 an entry",
        "Huang et al. 2025, https://arxiv.org/abs/2501.06842",
        matrix=2.0,
        counts=2,
        can_release=True,
        passes=20,  # AdamW's 7; what is cut: sinkgd.optim.algorithms.resets.cut_spikes
        scratch=3.0,  # the limit, its negative and the cut gradient
    ),
    Method(
        "adamw-8bit",
        "8-bit Adam",
        "2 bytes an entry, 8 bytes a block of 256",
        "Dettmers et al. 2021, https://arxiv.org/abs/2110.02861; blocks as in bitsandbytes",
        eight_bit=True,
    ),
    Method(
        "muon",
        "Muon",
        "1 an entry of matrices, 2 of the rest",
        "torch.optim.Muon; https://kellerjordan.github.io/posts/muon/",
        matrix=1.0,
        exchange="matrices",
        passes=5,
        scratch=3.0,  # 2.6 measured: benchmarks/memory/2026-11-25.json
        flops=_newton_schulz_muon,
    ),
    Method(
        "galore",
        "GaLore",
        "r·min(m, n) + 2r·max(m, n), 2 an entry of the rest",
        "Zhao et al. 2024, https://arxiv.org/abs/2403.03507, table 1",
        low_rank=lambda short, long, r: r * (short + 2.0 * long),
        exchange="matrices",
        passes=5,
        scratch=2.0,  # the update, projected back, and its copy: assumed
    ),
    Method(
        "apollo",
        "APOLLO",
        "2r·max(m, n), 2 an entry of the rest",
        "Zhu et al. 2024, https://arxiv.org/abs/2412.05270, table 1",
        low_rank=lambda short, long, r: 2.0 * r * long + 2 + 0 * short,
        exchange="projections",
        passes=5,
        scratch=2.0,  # as GaLore's
    ),
    Method(
        "apollo-mini",
        "APOLLO-Mini",
        "2·max(m, n), 2 an entry of the rest",
        "the same, at rank 1",
        low_rank=lambda short, long, r: 2.0 * long + 2 + 0 * r * short,
        exchange="projections",
        passes=5,
        scratch=2.0,
    ),
    Method(
        "sgd",
        "SGD",
        "0",
        "torch.optim.SGD without momentum: the floor",
        rest=0.0,
        passes=3,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _TABLE})


def find_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: If there is none; the message gives the nearest name.
    """
    if name not in METHODS:
        raise ConfigError(
            f"optimizer is {name!r}; did you mean {nearest(name, METHODS)!r}? "
            f"There are {', '.join(METHODS)}"
        )
    return METHODS[name]


def usual_rank(hidden_size: int) -> int:
    """Return r as GaLore's benchmark has it: a quarter of the hidden size, 256 at 768."""
    return 256 if hidden_size == 768 else max(1, hidden_size // 4)
