"""Measurements of speed and memory, each against the floor or the peer it is compared with."""

from sinkgd.lab.bench.loop import LoopBenchmark as LoopBenchmark
from sinkgd.lab.bench.loop import LoopSpeed as LoopSpeed
from sinkgd.lab.bench.loop import bench_loop as bench_loop
