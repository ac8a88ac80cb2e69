"""Measurements of speed and memory, compared with lower bounds, targets or other optimizers.

`bench_NAME`, or the package `gpu`, makes the measurement `sinkgd bench NAME`. `step_report` and
`memory_report` make the tables and pages of two of them. `interleaved` measures times, and
`contenders` and `workloads` define what is timed.
"""
