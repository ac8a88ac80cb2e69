"""`sinkgd bench memory`: what optimizers keep, and what a step allocates."""

from sinkgd.lab.bench.memory.records import MemoryRecord as MemoryRecord
from sinkgd.lab.bench.memory.run import MemoryPlan as MemoryPlan
from sinkgd.lab.bench.memory.run import bench_memory as bench_memory
