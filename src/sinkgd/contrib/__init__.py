"""More optimizers and methods, most of them for ablations and studies, one file each.

Importing this package adds the methods to `sinkgd.optim.methods.METHODS`.

``sinkgd-table`` is SinkGD with other options. Secondary sources report it for the embedding and the
head of DeepSeek-V4.1: Nesterov's momentum is applied first, tiny rows are left out, and the half
steps begin and end with rows. These sources also multiply its learning rate by 0.18; here the
group's ``lr`` has to include that factor.
"""

from sinkgd.contrib.adamw_8bit import AdamW8bit
from sinkgd.contrib.adamw_spam import AdamWSpam
from sinkgd.contrib.sage import Sage
from sinkgd.contrib.spam import Spam
from sinkgd.contrib.tempered import Tempered
from sinkgd.optim.methods import METHODS
from sinkgd.optim.methods.sinkhorn import Sinkhorn

METHODS.update(
    {
        "sinkgd-table": Sinkhorn(
            presets={
                "momentum": 0.95,
                "nesterov": True,
                "momentum_place": "before",
                "tiny_rows": "mask",
                "first": "row",
                "last": "row",
            }
        ),
        "tempered": Tempered(),
        "sage": Sage(),
        "spam": Spam(),
        "adamw-spam": AdamWSpam(),
        "adamw-8bit": AdamW8bit(),
    }
)
