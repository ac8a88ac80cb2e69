"""A training step to weigh, and its model in training: the lab's own parts, on random tokens.

Whether memory has room for a case is known before anything is allocated, by a bound from shapes
alone. Gradients, where they are released: three of the largest one, for autograd adds up what
chunks of the loss give into a third. Activations are bounded by the bytes a token that a block and
the loss hold at once; the bounds are about twice what is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sinkgd.lab.bench.problem import available_bytes
from sinkgd.lab.data import Batch
from sinkgd.lab.models import LanguageModel, build_model
from sinkgd.lab.train.config import OptimizerConfig, RunConfig, TrainingConfig
from sinkgd.lab.train.device import weight_dtype
from sinkgd.lab.train.gradient import ReleasedSteps
from sinkgd.lab.train.memory import state_tensors
from sinkgd.lab.train.parallel import Mesh, World
from sinkgd.lab.train.recipes import build_optimizer
from sinkgd.lab.train.resolve import resolve
from sinkgd.lab.train.step import take_step
from sinkgd.optim.grouped import GroupedOptimizer

_LR = 1e-4  # memory does not depend on it; random tokens want a low one


@dataclass(frozen=True)
class StepSettings:
    """What all cases have in common; by default activations are small."""

    batch_size: int = 1  # sequences, all at once
    sequence_length: int = 256  # tokens
    recompute: bool = True  # keep the inputs of blocks alone
    loss_chunk_tokens: int = 256  # targets whose logits are held at once


@dataclass(frozen=True)
class Case:
    """What to weigh, by name, so that it can be told to another process."""

    model: str  # a preset
    recipe: str
    release: bool
    settings: StepSettings
    device: str
    threads: int
    vocab_size: int | None = None  # tokens; by default the preset's

    @property
    def title(self) -> str:
        """The recipe, and what becomes of gradients."""
        return f"{self.recipe}, {'released' if self.release else 'kept'}"

    @property
    def config(self) -> RunConfig:
        """The run whose step it is, weights in bfloat16."""
        settings = self.settings
        return resolve(
            RunConfig(
                optimizer=OptimizerConfig(recipe=self.recipe, lr=_LR),
                training=TrainingConfig(
                    batch_size=settings.batch_size,
                    sequence_length=settings.sequence_length,
                    precision="bf16",
                    release_gradients=self.release,
                    recompute_activations=settings.recompute,
                    loss_chunk_tokens=settings.loss_chunk_tokens,
                ),
            )
        )


@dataclass(frozen=True)
class Trainee:
    """A model in training, on the same tokens in every step."""

    model: LanguageModel
    optimizer: Optimizer
    released: ReleasedSteps | None
    batch: Batch
    config: RunConfig
    device: torch.device

    def step(self) -> None:
        """Take a training step as `sinkgd train` does."""
        take_step(
            self.model,
            self.optimizer,
            self.batch,
            self.config,
            Mesh(self.device, World()),
            number=1,
            released=self.released,
        )


def model_on_meta(case: Case) -> LanguageModel:
    """Return the case's model in its type, without memory."""
    training = case.config.training
    with torch.device("meta"):
        model = build_model(
            case.model, vocab_size=case.vocab_size, max_sequence_length=training.sequence_length
        )
    model.recompute = training.recompute_activations
    return model.to(weight_dtype(training.precision))


def build_trainee(case: Case, watch: Callable[[Tensor], None] | None = None) -> Trainee:
    """Draw the weights and build the optimizer, in the order in which `sinkgd train` does.

    Args:
        case: What to build.
        watch: Told of each parameter whose gradient is there, before it is released.
    """
    config, device = case.config, torch.device(case.device)
    model = model_on_meta(case).to_empty(device=device).initialize(config.training.seed)
    if watch is not None:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(watch)  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(model, config.optimizer)
    return Trainee(
        model=model,
        optimizer=optimizer,
        released=ReleasedSteps(optimizer) if case.release else None,
        batch=_random_batch(case, model.config.vocab_size),
        config=config,
        device=device,
    )


def _random_batch(case: Case, vocab_size: int) -> Batch:
    rows, length = case.settings.batch_size, case.settings.sequence_length
    generator = torch.Generator(device="cpu").manual_seed(0)
    tokens = torch.randint(
        vocab_size, (rows, length + 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


_GRADIENTS_AT_ONCE = 3
_BYTES_PER_HIDDEN, _BYTES_PER_INNER = 96, 32  # of a block, an entry of the token's vectors
_BYTES_PER_LOGIT = 20  # in bfloat16, in float32, their softmax, and the gradients of both
_PROCESS = 1 << 30  # code, and what optimizers use meanwhile, such as batches of matrices
_SPARE = 1.05  # of the whole


def why_no_room(case: Case) -> str | None:
    """Say why a case does not fit into the memory that is free now; None where it does."""
    free, needed = available_bytes(torch.device(case.device)), needed_bytes(case)
    if free is None or needed <= free:
        return None
    return f"it may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def needed_bytes(case: Case) -> int:
    """Return a bound on the bytes that a case takes."""
    model = model_on_meta(case)
    sizes = [param.nbytes for param in model.parameters()]
    gradients = _GRADIENTS_AT_ONCE * max(sizes) if case.release else sum(sizes)
    parts = sum(sizes) + gradients + _state_bytes(model, case) + _activation_bytes(model, case)
    return int(_SPARE * parts) + _PROCESS


def _state_bytes(model: LanguageModel, case: Case) -> int:
    optimizer = build_optimizer(model, case.config.optimizer)
    if isinstance(optimizer, GroupedOptimizer):
        optimizer.init_state()
    else:  # others make theirs in a step
        for group in optimizer.param_groups:
            if "fused" in group:  # torch's, of which only the plain ones run without memory
                group.update(fused=False, foreach=False)
            elif "foreach" in group:  # pytorch-optimizer's plain ones read numbers back
                group["foreach"] = True
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


def _activation_bytes(model: LanguageModel, case: Case) -> int:
    settings, sizes = case.settings, model.config
    tokens = settings.batch_size * settings.sequence_length
    block = _BYTES_PER_HIDDEN * sizes.hidden_size + _BYTES_PER_INNER * sizes.intermediate_size
    inputs = 2 * sizes.hidden_size * sizes.num_layers
    blocks = inputs + block if settings.recompute else sizes.num_layers * block
    logits = min(tokens, settings.loss_chunk_tokens) * sizes.vocab_size
    return tokens * blocks + _BYTES_PER_LOGIT * logits
