"""The other half of `sinkgd bench memory`: peaks of whole training steps, release × optimizer."""

from sinkgd.lab.bench.memory.training.case import StepSettings as StepSettings
from sinkgd.lab.bench.memory.training.run import TrainingPlan as TrainingPlan
from sinkgd.lab.bench.memory.training.run import bench_training as bench_training
