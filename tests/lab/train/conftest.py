"""A small corpus and a small run: seconds, not minutes."""

import random
from pathlib import Path

import pytest
import torch

from sinkgd.lab.data import open_corpus, prepare, train_tokenizer
from sinkgd.lab.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    TrainingConfig,
)

WORDS = ("the", "of", "and", "to", "in", "a", "state", "union", "people", "law", "year", "war")
VOCAB_SIZE = 280


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of 300 words, prepared."""
    draw = random.Random(0)
    texts = tmp_path_factory.mktemp("texts")
    for i in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(300))
        (texts / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus([str(texts)], validation_fraction=0.3)
    folder = tmp_path_factory.mktemp("shards") / "words"
    prepare(corpus, folder, train_tokenizer(corpus, VOCAB_SIZE))
    return folder


def twelve_steps(shards: Path) -> RunConfig:
    """Evaluate every 4 steps, and save every 5."""
    return RunConfig(
        data=DataConfig(corpus=str(shards)),
        training=TrainingConfig(
            steps=12, batch_size=4, sequence_length=16, precision="float32", threads=1
        ),
        evaluation=EvaluationConfig(every_steps=4, tokens=100),
        checkpoint=CheckpointConfig(every_steps=5),
    )


@pytest.fixture
def config(shards: Path) -> RunConfig:
    """Twelve steps, an evaluation every 4, a checkpoint every 5."""
    return twelve_steps(shards)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
