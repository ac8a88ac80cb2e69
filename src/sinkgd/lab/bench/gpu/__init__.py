"""`sinkgd bench gpu`: what can be counted of a step on a GPU, without having a GPU."""

from sinkgd.lab.bench.gpu.run import PARTS as PARTS
from sinkgd.lab.bench.gpu.run import Plan as Plan
from sinkgd.lab.bench.gpu.run import bench_gpu as bench_gpu
from sinkgd.lab.bench.gpu.tables import GpuRecord as GpuRecord
