"""Optional changes to a step of SR-Sinkhorn: one class per file, off by default.

`sinkgd.optim.transform` is their contract, and `sinkgd.optim.methods.sinkhorn` runs them.
"""

from sinkgd.optim.transform import Transform
from sinkgd.optim.transforms.averaged_scales import AveragedScales
from sinkgd.optim.transforms.constant_norm import ConstantNorm
from sinkgd.optim.transforms.cross_fit import CrossFit
from sinkgd.optim.transforms.deflate import Deflate
from sinkgd.optim.transforms.half_step import ExtraHalfStep
from sinkgd.optim.transforms.low_rank_momentum import LowRankMomentum
from sinkgd.optim.transforms.momentum import Momentum
from sinkgd.optim.transforms.operator_norm import OperatorNorm
from sinkgd.optim.transforms.tiny_rows import TinyRows
from sinkgd.optim.transforms.warm_start import WarmStart
from sinkgd.optim.transforms.weight_projection import WeightProjection

# In the order in which a step applies them.
TRANSFORMS: tuple[Transform, ...] = (
    Momentum(),
    LowRankMomentum(),
    TinyRows(),
    ExtraHalfStep(),
    WarmStart(),
    CrossFit(),
    AveragedScales(),
    Deflate(),
    WeightProjection(),
    OperatorNorm(),
    ConstantNorm(),
)
