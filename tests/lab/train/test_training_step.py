"""A step is the same however its batch is cut, and never moves a weight on a NaN."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax
from torch.testing import assert_close

from sinkgd.lab.data import IGNORE_INDEX, Batch
from sinkgd.lab.models import build_model
from sinkgd.lab.train.config import OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.mesh import Mesh
from sinkgd.lab.train.recipes import build_optimizer, resolve_optimizer
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.training_step import NonFiniteLossError, summed_loss, take_step
from sinkgd.lab.train.world import World

ALONE = Mesh(torch.device("cpu"), World())
VOCAB, ROWS, TOKENS = 64, 6, 16


@pytest.fixture(scope="module")
def model():
    return build_model("llama-nano", vocab_size=VOCAB, max_sequence_length=TOKENS)


@pytest.fixture
def padded_batch() -> Batch:
    """Rows of very different length, so that a mean of means would show."""
    drawn = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].clone()
    for row, length in enumerate([16, 1, 2, 12, 5, 3]):
        targets[row, length:] = IGNORE_INDEX
    return Batch(inputs, targets)


def config(micro_batch_size: int = ROWS, clip_norm: float | None = None) -> RunConfig:
    return resolve(
        RunConfig(
            training=TrainingConfig(
                batch_size=ROWS,
                micro_batch_size=micro_batch_size,
                sequence_length=TOKENS,
                precision="float32",
            ),
            optimizer=OptimizerConfig(recipe="sgd", clip_norm=clip_norm),
        )
    )


def gradients(model, batch: Batch, run: RunConfig) -> tuple[list[torch.Tensor], float, float]:
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.0)
    result = take_step(own, optimizer, batch, run, ALONE, number=1)
    return [p.grad for p in own.parameters()], result.loss, result.gradient_norm


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_batch(model, padded_batch, micro_batch_size):
    expected, loss, norm = gradients(model, padded_batch, config(clip_norm=0.0))
    found, cut_loss, cut_norm = gradients(model, padded_batch, config(micro_batch_size, 0.0))
    # Sums in another order: a few roundings of float32.
    assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert (cut_loss, cut_norm) == pytest.approx((loss, norm), rel=1e-5)


def test_the_first_half_of_the_micro_batches_gives_the_scales(model, padded_batch):
    run = config(1)
    options = resolve_optimizer(OptimizerConfig(recipe="sinkgd", cross_fit=True, clip_norm=0.0))
    run = replace(run, optimizer=options)
    models = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [build_optimizer(own, options) for own in models]
    take_step(models[0], optimizers[0], padded_batch, run, ALONE, number=1)
    scored = (padded_batch.targets != IGNORE_INDEX).sum()
    for row in range(ROWS):
        own = slice(row, row + 1)
        loss = summed_loss(models[1](padded_batch.inputs[own]), padded_batch.targets[own]) / scored
        loss.backward()
        if row + 1 == ROWS // 2:
            optimizers[1].hold_out()
    optimizers[1].step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not all(map(torch.equal, models[0].parameters(), model.parameters()))


def test_the_loss_is_the_mean_over_scored_targets(model, padded_batch):
    with torch.no_grad():
        log_probabilities = log_softmax(model(padded_batch.inputs).double(), dim=-1)
    scored = padded_batch.targets != IGNORE_INDEX
    chosen = log_probabilities[scored].gather(-1, padded_batch.targets[scored].unsqueeze(-1))
    _, loss, _ = gradients(model, padded_batch, config(2))
    assert loss == pytest.approx(-chosen.mean().item(), rel=1e-6)


def test_padding_changes_no_gradient(model, padded_batch):
    other = Batch(padded_batch.inputs.clone(), padded_batch.targets)
    other.inputs[1, 5:] = 7  # behind the only scored target of that row
    assert_close(
        gradients(model, other, config(2))[0],
        gradients(model, padded_batch, config(2))[0],
        rtol=1e-5,
        atol=1e-8,
    )


def test_clipping_scales_the_gradient_and_reports_its_norm_before(model, padded_batch):
    free, _, norm = gradients(model, padded_batch, config(clip_norm=0.0))
    clipped, _, reported = gradients(model, padded_batch, config(clip_norm=norm / 4))
    assert reported == norm
    assert_close(clipped, [gradient / 4 for gradient in free], rtol=1e-4, atol=1e-9)


def test_a_gradient_below_the_limit_is_left_alone(model, padded_batch):
    free, _, norm = gradients(model, padded_batch, config(clip_norm=0.0))
    assert_close(gradients(model, padded_batch, config(clip_norm=2 * norm))[0], free)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_nan_names_the_step_and_moves_no_weight(model, padded_batch, poison):
    own = copy.deepcopy(model)
    with torch.no_grad():
        own.lm_head.weight[3, 3] = poison
    before = copy.deepcopy(own.state_dict())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    with pytest.raises(NonFiniteLossError, match=r"step 17 has loss .* lower --optimizer.lr"):
        take_step(own, optimizer, padded_batch, config(), ALONE, number=17)
    assert_close(own.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_the_loss_is_computed_in_float32():
    logits = torch.randn(2, 3, VOCAB, dtype=torch.bfloat16)
    targets = torch.randint(VOCAB, (2, 3))
    loss = summed_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, summed_loss(logits.float(), targets))


@pytest.mark.parametrize("precision", ["float32", "bf16-autocast", "bf16"])
def test_every_precision_trains(model, padded_batch, precision):
    own = copy.deepcopy(model)
    if precision == "bf16":
        own.to(torch.bfloat16)
    run = config(2)
    run = replace(run, training=replace(run.training, precision=precision))
    optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
    losses = [
        take_step(own, optimizer, padded_batch, run, ALONE, number=i).loss for i in range(1, 6)
    ]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in own.parameters()} == {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }
