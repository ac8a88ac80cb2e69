"""How far a backend's float32 scales are from float64's, on a workload's own gradients.

The reference is the definition, `sinkgd.kernels.eager`, run on the gradient in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sinkgd import kernels
from sinkgd.kernels import Scales
from sinkgd.lab.bench.contenders import ITERATIONS
from sinkgd.lab.bench.problem import build_problem
from sinkgd.lab.bench.step.records import Accuracy
from sinkgd.lab.bench.workloads import Workload


def measure_accuracy(workload: Workload, backend: str, device: torch.device) -> Accuracy:
    """Compare one gradient of each shape of a workload with float64."""
    problem = build_problem(workload, "float32", device)
    iterations = ITERATIONS[0]
    found = kernels.select(backend, device)
    worst = 0.0
    for grad in _one_of_each_shape(problem.grads):
        (scales,) = found.scales([grad], iterations)
        (exact,) = kernels.select("eager", device).scales([grad.double()], iterations)
        worst = max(worst, relative_error(scales, exact))
    return Accuracy(backend, workload.name, iterations, worst)


def relative_error(scales: Scales, exact: Scales) -> float:
    """Return the largest relative error of the products r·c, over all rows and columns.

    Products, for a factor may have moved from r to c. No product is formed: with a and b the ratios
    of the rows and of the columns, the ratios of the products lie between min a · min b and
    max a · max b.
    """
    rows, cols = scales.row.double() / exact.row, scales.col.double() / exact.col
    ends = rows.min() * cols.min() - 1, rows.max() * cols.max() - 1
    return max(abs(end.item()) for end in ends)


def _one_of_each_shape(grads: list[Tensor]) -> Iterator[Tensor]:
    yield from {grad.shape: grad for grad in grads}.values()
