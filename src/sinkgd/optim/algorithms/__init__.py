"""The algorithms a parameter group can name: one table, every optimizer."""

from collections.abc import Mapping
from types import MappingProxyType

from sinkgd.optim.algorithms.adamw import AdamW
from sinkgd.optim.algorithms.adamw_spam import AdamWSpam
from sinkgd.optim.algorithms.contract import Algorithm
from sinkgd.optim.algorithms.multi_normalized import MNGD, SWAN
from sinkgd.optim.algorithms.normalize import Normalize
from sinkgd.optim.algorithms.sinkhorn import Sinkhorn
from sinkgd.optim.algorithms.spam import Spam
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
        "adamw": AdamW(),
        "spam": Spam(),
        "adamw-spam": AdamWSpam(),
    }
)

# Their step looks at all gradients of a group at once, so it cannot be taken one by one.
NEEDS_ALL_GRADIENTS = frozenset({"adamw-spam"})
