"""`sinkgd bench step`: optimizer steps on real matrices, against AdamW and against the floor."""

from sinkgd.lab.bench.step.records import StepRecord as StepRecord
from sinkgd.lab.bench.step.run import CHECKS as CHECKS
from sinkgd.lab.bench.step.run import Plan as Plan
from sinkgd.lab.bench.step.run import bench_step as bench_step
