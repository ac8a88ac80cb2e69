"""`sinkgd bench kernels`: the backends over shapes and types, in bytes a second."""

from sinkgd.lab.bench.kernels.cases import CASES as CASES
from sinkgd.lab.bench.kernels.measure import KernelsPlan as KernelsPlan
from sinkgd.lab.bench.kernels.measure import bench_kernels as bench_kernels
from sinkgd.lab.bench.kernels.records import KernelsRecord as KernelsRecord
