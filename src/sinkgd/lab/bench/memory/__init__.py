"""`sinkgd bench memory`: what optimizers keep and allocate, and the peaks of training with them."""

from sinkgd.lab.bench.memory.records import MemoryRecord as MemoryRecord
from sinkgd.lab.bench.memory.run import MemoryPlan as MemoryPlan
from sinkgd.lab.bench.memory.run import bench_memory as bench_memory
