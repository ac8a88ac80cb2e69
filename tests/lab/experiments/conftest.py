"""A study of seconds: two arms, grids of two points, two seeds."""

from pathlib import Path

import pytest

from lab.train.conftest import shards as shards  # noqa: PLC0414  a fixture
from sinkgd.lab.experiments.arms import Arm
from sinkgd.lab.experiments.study import StudyPlan
from sinkgd.lab.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    SharedConfig,
    TrainingConfig,
)

GRID = {"optimizer.lr": (0.01, 0.04)}
ARMS = (
    Arm("sinkgd-L2", {"optimizer.recipe": "sinkgd", "optimizer.sinkhorn_iterations": 2}, GRID, 2.0),
    Arm("adamw", {"optimizer.recipe": "adamw"}, GRID, control=True),
)


def small_plan(shards: Path, **options: object) -> StudyPlan:
    shared = SharedConfig(
        data=DataConfig(corpus=str(shards)),
        training=TrainingConfig(
            steps=6, batch_size=4, sequence_length=16, precision="float32", threads=1
        ),
        evaluation=EvaluationConfig(every_steps=3, tokens=100),
        checkpoint=CheckpointConfig(every_steps=3, keep=1),
    )
    given = {"arms": ARMS, "seeds": (0, 1), "tune": True, **options}
    return StudyPlan("iterations", "machine", shared, **given)


@pytest.fixture
def plan(shards: Path) -> StudyPlan:
    return small_plan(shards)
