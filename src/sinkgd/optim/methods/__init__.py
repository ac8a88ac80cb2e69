"""The table of methods, by the ``algorithm`` of a group. `sinkgd.contrib` adds methods to it."""

from sinkgd.optim.method import Method
from sinkgd.optim.methods.adamw import AdamW
from sinkgd.optim.methods.multi_normalized import MultiNormalized, swan_norms
from sinkgd.optim.methods.normalize import Normalize
from sinkgd.optim.methods.sinkhorn import Sinkhorn

METHODS: dict[str, Method] = {
    "sinkgd": Sinkhorn(),
    "swan": MultiNormalized({"newton_schulz_steps": 5, "num_iters": 1}, swan_norms),
    "mngd": MultiNormalized({"norms": (), "num_iters": 5}, lambda group: tuple(group["norms"])),
    "normalize": Normalize(),
    "stateless": Sinkhorn(vectors=Normalize()),
    "adamw": AdamW(),
}
