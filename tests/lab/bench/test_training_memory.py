"""The peak of a training step: its parts are counted, and what does not fit is not begun."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from lab.bench.synthetic import memory_record
from lab.bench.synthetic import training_memory as synthetic_memory
from lab.report.test_page import Parsed
from sinkgd.lab.bench import bench_memory, training_memory
from sinkgd.lab.bench.bench_memory import TrainingPlan, bench_training, cases_of
from sinkgd.lab.bench.memory_report import MemoryRecord, memory_page
from sinkgd.lab.bench.training_memory import (
    Case,
    Change,
    Mark,
    Peak,
    StepSettings,
    build_trainee,
    peak_of_last_step,
)
from sinkgd.lab.commands.bench.shared import read_record, write_record
from sinkgd.lab.models import preset_config
from sinkgd.lab.train.recipes import RECIPES
from sinkgd.lab.train.state import state_tensors

CPU = torch.device("cpu")
SETTINGS = StepSettings(sequence_length=32, loss_chunk_tokens=32)
VOCAB = 512
WEIGHTS = 2 * preset_config("llama-9m", vocab_size=VOCAB).parameter_count
LARGEST = 2 * VOCAB * 128


def case(recipe="sinkgd-stateless", release=False, **settings):
    threads = torch.get_num_threads()
    own = replace(SETTINGS, **settings)
    return Case("llama-9m", recipe, release, own, "cpu", threads, vocab_size=VOCAB)


@cache
def measured(own):
    """Measure a case once for all tests, and leave malloc of this process as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_memory, "return_freed_memory", lambda: None)
        return training_memory.measure_inside(own)


def test_gradients_that_are_kept_are_all_there_at_the_peak():
    use = measured(case())
    assert use.weights_bytes == use.gradients_bytes == WEIGHTS


def test_release_lowers_the_peak_by_all_gradients_but_one_and_a_recomputed_block():
    kept, released = measured(case()), measured(case(release=True))
    assert 0 < released.gradients_bytes <= LARGEST
    block = 32 * (40 * 128 + 20 * 352)  # bytes, of 32 tokens
    saved = kept.peak_bytes - released.peak_bytes
    assert WEIGHTS - LARGEST - block < saved < WEIGHTS


@pytest.mark.parametrize(("recipe", "copies"), [("adamw", 2), ("sgd", 0), ("sinkgd-stateless", 0)])
def test_state_is_counted_in_copies_of_the_weights(recipe, copies):
    use = measured(case(recipe))
    assert 0 <= use.state_bytes - copies * WEIGHTS < 1000
    assert use.of_weights == pytest.approx(2 + copies, abs=0.15)


@pytest.mark.parametrize("release", [True, False])
def test_parts_add_up_to_the_peak_or_below(release):
    use = measured(case("sinkgd-paper", release))  # deflation works on float32 copies
    assert 0 <= use.rest_bytes < WEIGHTS / 2
    assert 0 <= use.activations_bytes <= use.kept_activations_bytes
    assert use.peak_bytes == (
        use.weights_bytes
        + use.state_bytes
        + use.gradients_bytes
        + use.activations_bytes
        + use.rest_bytes
    )


def test_activations_are_the_inputs_of_the_blocks_or_all_that_they_compute():
    inputs = 32 * 128 * 2
    layers, random_state = 4, 5056
    recomputed = measured(case()).kept_activations_bytes
    assert layers * inputs <= recomputed < (layers + 6) * inputs + (layers + 1) * random_state
    assert measured(case(recompute=False)).kept_activations_bytes > 5 * recomputed


def test_a_block_is_a_gradient_from_its_allocation_on_and_an_address_is_used_again():
    events = [
        Change(1, 10),
        Mark("step"),
        Change(2, 5),
        Change(2, -5),  # not there when backward begins
        Change(3, 2),
        Mark("backward"),
        Change(2, 10),  # the highest level, before the gradient is seen to be one
        Change(3, -2),
        Mark("gradient", 2),
        Change(2, -10),
        Change(2, 9),  # no gradient
        Change(99, -1),  # allocated before the recording
    ]
    assert peak_of_last_step(events) == Peak(22, gradients=10, activations=2, activations_kept=2)


def test_the_last_step_counts_alone():
    events = [Mark("step"), Mark("backward"), Change(1, 100), Change(1, -100)]
    events += [Mark("step"), Mark("backward"), Change(1, 3)]
    assert peak_of_last_step(events).bytes == 3


@pytest.mark.slow
@pytest.mark.parametrize("release", [True, False])
def test_both_views_agree_where_no_matrix_is_large(release):
    # Where a CPU has no instructions for bfloat16, oneDNN computes a product in a float32 buffer
    # of its own, which the system alone counts. With few tokens, no product is large.
    given = replace(case(release=release), model="llama-60m")
    uses = [training_memory.measure_in_fresh_processes(given) for _ in range(2)]
    assert not any(isinstance(use, str) for use in uses), uses
    # What the system counts also has pages of libraries that a process happens to load meanwhile,
    # so the lesser of two counts is nearer to the step's own.
    least = min(uses, key=lambda use: use.outside_bytes)
    assert least.peak_bytes == pytest.approx(least.outside_bytes, rel=0.1)


@pytest.mark.parametrize(
    "own",
    [
        case(),
        case(release=True),
        case("adamw"),
        case("sgd"),
        case("sinkgd-paper"),
        case(recompute=False),
    ],
    ids=lambda own: f"{own.title}, {own.settings.recompute}",
)
def test_the_bound_holds_and_is_not_far(monkeypatch, own):
    monkeypatch.setattr(training_memory, "_PROCESS", 0)
    assert (
        measured(own).peak_bytes
        <= training_memory.needed_bytes(own)
        <= 2 * measured(own).peak_bytes
    )


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if not r.can_release])
def test_the_state_of_every_recipe_is_found_without_memory(recipe):
    own = case(recipe)
    trainee = build_trainee(own)
    for param in trainee.model.parameters():
        param.grad = torch.ones_like(param)
    trainee.optimizer.step()
    kept = sum(tensor.nbytes for tensor in state_tensors(trainee.optimizer))
    found = training_memory._state_bytes(training_memory.model_on_meta(own), own)
    # The batched Adafactor, which runs without memory, keeps no RMS of a parameter.
    spare = 2 * len(list(trainee.model.parameters())) if recipe == "adafactor" else 0
    assert kept - spare == found


def test_a_model_that_does_not_fit_is_refused_by_name_and_not_begun(monkeypatch):
    def begun(own):
        raise AssertionError(own)

    monkeypatch.setattr(bench_memory, "measure_in_fresh_processes", begun)
    monkeypatch.setattr(training_memory, "available_bytes", lambda device: 5 << 30)
    found = bench_training(TrainingPlan(("llama-1b",), ("adamw",), (True, False), SETTINGS, CPU))
    assert found.uses == ()
    (row,) = found.absent
    assert (row.model, row.title) == ("llama-1b", "adamw, kept")
    assert row.reason.startswith("it may need 11.")
    assert row.reason.endswith(" GiB, but only 5.0 GiB are free")


def test_recipes_release_where_they_can():
    plan = TrainingPlan(("llama-9m",), ("sinkgd", "adamw"), (True, False), SETTINGS, CPU)
    titles = [own.title for own in cases_of(plan)]
    assert titles == ["sinkgd, released", "sinkgd, kept", "adamw, kept"]


def test_a_case_trains():
    trainee = build_trainee(case(release=True))
    before = trainee.model.lm_head.weight.clone()
    trainee.step()
    assert not torch.equal(trainee.model.lm_head.weight, before)
    assert trainee.model.lm_head.weight.grad is None


def test_the_page_and_the_record_have_every_case(tmp_path):
    record = memory_record()
    write_record(tmp_path / "memory.json", record)
    assert read_record(tmp_path / "memory.json", MemoryRecord) == record
    page = Parsed(memory_page(record))
    assert "training-llama-1b" in {tag.get("id") for _, tag in page.tags}
    for use in synthetic_memory().uses:
        assert use.title in page.text
    assert "not measured: it may need 11.8 GiB" in page.text
    assert "llama-1b with sinkgd-stateless peaks at 1.06 times its weights" in page.text


def test_an_older_record_has_no_training(tmp_path):
    path = tmp_path / "memory.json"
    path.write_text('{"command": "c", "environment": {}, "uses": [], "absent": []}')
    assert read_record(path, MemoryRecord) == MemoryRecord("c", {}, (), ())
    assert "What optimizers keep" in Parsed(memory_page(read_record(path, MemoryRecord))).text
