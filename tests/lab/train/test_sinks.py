"""Results go elsewhere too, and an absent package is named with the command that brings it."""

import sys
import types
from dataclasses import replace

import pytest

from sinkgd.lab.results import Evaluation, ModelStatistics, Resume, RunStart, TrainStep
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.sinks import SINKS, open_sinks, scalars

START = RunStart("first", "sgd", 0, "sinkgd train", {"a": {"b": 1}}, {}, 1, 1)
STEP = TrainStep(3, 300, 1.5, 2.5, 0.1, 1.0, 0.5, 0.1)
EVALUATION = Evaluation(3, 300, 1.5, 2.25, 9.5, 0.75, 1000)
STATISTICS = ModelStatistics(3, {"attention_entropy/mean": 1.25})


def test_the_table_has_every_sink():
    assert set(SINKS) == {"tensorboard", "wandb", "trackio"}


def test_figures_are_named_after_their_fields():
    assert scalars(STEP)["train/loss"] == 2.5
    assert scalars(EVALUATION)["validation/bits_per_byte"] == 0.75
    assert "validation/galore_perplexity" not in scalars(EVALUATION)  # an old record has none
    both = replace(EVALUATION, galore_perplexity=9.25)
    assert scalars(both)["validation/galore_perplexity"] == 9.25
    assert scalars(STATISTICS) == {"model/attention_entropy/mean": 1.25}
    assert "train/step" not in scalars(STEP)
    assert scalars(Resume(3)) == {}


def test_tensorboard_files_hold_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(("tensorboard",), tmp_path, START) as sinks:
        for record in (START, STEP, EVALUATION, STATISTICS):
            sinks[0](record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    (validation,) = events.Scalars("validation/val_loss")
    assert (loss.step, loss.value) == (3, 2.5)
    assert (validation.step, validation.value) == (3, 2.25)
    (entropy,) = events.Scalars("model/attention_entropy/mean")
    assert (entropy.step, entropy.value) == (3, 1.25)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_logging_services_get_configuration_figures_and_an_end(monkeypatch, tmp_path, name):
    calls: list[tuple] = []
    package = types.ModuleType(name)
    package.init = lambda **options: calls.append(("init", options["name"], options["config"]))
    package.log = lambda figures, step: calls.append(("log", step, figures["train/loss"]))
    package.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, package)
    with open_sinks((name,), tmp_path, START) as sinks:
        for record in (START, STEP):
            sinks[0](record)
    assert calls == [("init", "first", {"a": {"b": 1}}), ("log", 3, 2.5), ("finish",)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_absent_package_is_named_with_the_command(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"{name}, which is not installed; run `pip install 'sinkgd\[{name}\]'`"
    with pytest.raises(ConfigError, match=message), open_sinks((name,), tmp_path, START):
        pytest.fail("the sink was opened")
