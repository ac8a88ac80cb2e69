"""Measurements of speed, each against the floor it is compared with."""

from sinkgd.lab.bench.loop import Contender as Contender
from sinkgd.lab.bench.loop import LoopBenchmark as LoopBenchmark
from sinkgd.lab.bench.loop import bench_loop as bench_loop
