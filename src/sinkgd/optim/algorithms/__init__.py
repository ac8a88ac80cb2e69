"""The algorithms a parameter group can name: one table, every optimizer."""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.optim.algorithms.adamw import AdamW
from sinkgd.optim.algorithms.contract import Algorithm
from sinkgd.optim.algorithms.multi_normalized import MNGD, SWAN
from sinkgd.optim.algorithms.normalize import Normalize
from sinkgd.optim.algorithms.sage import Sage
from sinkgd.optim.algorithms.sinkhorn import Sinkhorn
from sinkgd.optim.algorithms.stateless import Stateless
from sinkgd.optim.algorithms.tempered import Tempered

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "sinkgd": Sinkhorn(),
        "swan": SWAN,
        "mngd": MNGD,
        "normalize": Normalize(),
        "stateless": Stateless(),
        "tempered": Tempered(),
        "sage": Sage(),
        "adamw": AdamW(),
    }
)
