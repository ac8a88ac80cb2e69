"""The algorithms a parameter group can name: one table, every optimizer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sinkgd.optim.algorithms.adamw import AdamW
from sinkgd.optim.algorithms.adamw_spam import AdamWSpam
from sinkgd.optim.algorithms.contract import Algorithm
from sinkgd.optim.algorithms.momentum import WithMomentum
from sinkgd.optim.algorithms.multi_normalized import MNGD, SWAN
from sinkgd.optim.algorithms.normalize import Normalize
from sinkgd.optim.algorithms.sage import Sage
from sinkgd.optim.algorithms.sinkhorn import Sinkhorn
from sinkgd.optim.algorithms.spam import Spam
from sinkgd.optim.algorithms.stateless import Stateless
from sinkgd.optim.algorithms.tempered import Tempered

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "sinkgd": WithMomentum(Sinkhorn()),
        "sinkgd-table": WithMomentum(Sinkhorn()),
        "swan": WithMomentum(SWAN),
        "mngd": WithMomentum(MNGD),
        "normalize": Normalize(),
        "stateless": WithMomentum(Stateless()),
        "tempered": Tempered(),
        "sage": Sage(),
        "adamw": AdamW(),
        "spam": Spam(),
        "adamw-spam": AdamWSpam(),
    }
)

# Algorithms that are others with options: a group may change them, the optimizer's defaults do not.
FORMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Reported for the embedding and the head of DeepSeek-V4.1, by secondary sources: half steps
        # that begin and end with rows, of directions with Nesterov's momentum, without tiny rows.
        # They give its learning rate a factor of 0.18, which is left to the group's ``lr``.
        "sinkgd-table": MappingProxyType(
            {
                "momentum": 0.95,
                "nesterov": True,
                "momentum_place": "before",
                "tiny_rows": "mask",
                "first": "row",
                "last": "row",
            }
        )
    }
)

# Their step looks at all gradients of a group at once, so it cannot be taken one by one.
NEEDS_ALL_GRADIENTS = frozenset({"adamw-spam"})

# They treat every entry by itself, so a flat piece of a parameter is as good as the whole.
ELEMENTWISE = frozenset({"adamw", "spam"})
