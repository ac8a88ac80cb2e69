"""Measurements of speed and memory, each against the floor or the peer it is compared with.

`bench_NAME`, or the package `gpu`, makes the measurement `sinkgd bench NAME`; `NAME_report` makes
its tables and page. `interleaved` is how times are taken, `contenders` and `workloads` what is
timed.
"""
