"""Backends of SR-Sinkhorn.

`backend` is their contract, `eager` defines the result, and `registry` chooses a backend.
"""

from sinkgd.kernels.backend import Backend as Backend
from sinkgd.kernels.backend import Cautious as Cautious
from sinkgd.kernels.backend import CorrectedScales as CorrectedScales
from sinkgd.kernels.backend import Descent as Descent
from sinkgd.kernels.backend import Keep as Keep
from sinkgd.kernels.backend import Matrices as Matrices
from sinkgd.kernels.backend import Scales as Scales
from sinkgd.kernels.backend import Shared as Shared
from sinkgd.kernels.backend import Stack as Stack
from sinkgd.kernels.registry import backends as backends
from sinkgd.kernels.registry import describe as describe
from sinkgd.kernels.registry import select as select
