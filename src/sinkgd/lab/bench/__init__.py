"""Measurements of speed and memory, each compared with a lower bound or with other optimizers.

`bench_NAME`, or the package `gpu`, makes the measurement `sinkgd bench NAME`; `NAME_report` makes
its tables and page. `interleaved` measures times, and `contenders` and `workloads` define what is
timed.
"""
