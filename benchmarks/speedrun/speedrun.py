"""Train the optimization track of modded-nanogpt with SinkGD, AdamW or Muon.

The track fixes the text, the batch and the model, and asks for the fewest steps to a validation
loss of 3.28 (https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization). The
recipes differ only in the optimizer of the hidden matrices, its rate and weight decay, the number
of steps and the warmup; embedding, head and vectors are trained by AdamW as in the track's
baseline. Start the script with 1, 2, 4 or 8 GPUs:

    torchrun --standalone --nproc-per-node 8 benchmarks/speedrun/speedrun.py --data fineweb10B

A run cannot be resumed: on 8 H100 the track's own runs take less than a quarter of an hour. The log
begins with a program of one file that repeats the run, as the track asks.
"""

import argparse
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from one_file import one_file
from token_shards import ShardError, TokenShards
from torch import Tensor
from torch.optim import Optimizer
from track_model import GPT, Size
from track_recipes import RECIPES, Recipe

# The rule for n runs that were not selected: (TARGET - mean loss) * √n is at least MARGIN.
TARGET, MARGIN = 3.28, 0.004
COOLDOWN = 0.7  # the last part of the steps, in which rates fall linearly to zero


@dataclass(frozen=True)
class Track:
    """What a run may not change: the model, and the tokens that it reads."""

    model: Size = field(default_factory=Size)
    row_tokens: int = 1024
    rows: int = 64  # that one forward pass takes
    batch_tokens: int = 8 * 64 * 1024
    val_tokens: int = 20 * 8 * 64 * 1024


TRACK = Track()
TINY = Track(Size(256, layers=2, width=64, head_width=32), 64, 4, 2 * 4 * 64, 8 * 4 * 64)


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen by one of them."""

    rank: int
    count: int
    device: torch.device

    def wait(self) -> None:
        """Wait for the device and for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.count > 1:
            dist.barrier()

    def add(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.count > 1:
            pending = [dist.all_reduce(value, async_op=True) for value in values]
            for message in pending:
                message.wait()


class Log:
    """The log of a run: a program that repeats it, and then its lines. Only rank 0 writes it."""

    def __init__(self, folder: Path, recipe: str, arguments: Sequence[str], ranks: Ranks) -> None:
        self.path = folder / f"{recipe}-{uuid.uuid4()}.txt"
        self.writes = ranks.rank == 0
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text(one_file(arguments), encoding="utf-8")

    def write(self, line: str) -> None:
        """Write a line to the file, and print it."""
        if self.writes:
            print(line, flush=True)  # noqa: T201 - this is a script
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def lr_factor(step: int, recipe: Recipe) -> float:
    """Return the factor of the rates in a step; steps are counted from 0."""
    cooldown = min(1.0, (1 - step / recipe.steps) / COOLDOWN)
    warmup = recipe.warmup * recipe.steps
    return cooldown * min(1.0, (step + 1) / warmup) if warmup else cooldown


def train_step(
    model: GPT,
    optimizers: Sequence[Optimizer],
    batch: tuple[Tensor, Tensor],
    rows: int,
    ranks: Ranks,
) -> None:
    """Take one step on the sum of the losses of all ranks' tokens."""
    for inputs, targets in _micro_batches(batch, rows):
        model(inputs, targets).backward()
    ranks.add(param.grad for param in model.parameters() if param.grad is not None)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: GPT, batch: tuple[Tensor, Tensor], track: Track, ranks: Ranks) -> float:
    """Return the mean loss of all ranks' validation tokens, in nats."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for inputs, targets in _micro_batches(batch, track.rows):
        total += model(inputs.to(ranks.device), targets.to(ranks.device))
    ranks.add([total])
    return float(total) / track.val_tokens


def _micro_batches(batch: tuple[Tensor, Tensor], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = batch
    for first in range(0, len(inputs), rows):
        yield inputs[first : first + rows], targets[first : first + rows]


class Trainer:
    """Trains one recipe, once for each seed.

    Args:
        track: The sizes.
        recipe: The recipe, with the values of the command line.
        data: The folder of the shards.
        ranks: The processes.
        log: Where losses and times go.

    Raises:
        ShardError: If a shard is damaged, or the shards are too short for the run.
    """

    def __init__(self, track: Track, recipe: Recipe, data: Path, ranks: Ranks, log: Log) -> None:
        self.track, self.recipe, self.ranks, self.log = track, recipe, ranks, log
        self.shards = TokenShards(data, "train", track.model.vocab_size)
        self.shards.check(track.batch_tokens, recipe.steps)
        held_out = TokenShards(data, "val", track.model.vocab_size)
        held_out.check(track.val_tokens, 1)
        shape = (track.row_tokens, ranks.rank, ranks.count)
        self.validation = next(held_out.batches(track.val_tokens, *shape))
        self.model = GPT(track.model).to(ranks.device)
        if ranks.device.type == "cuda":
            self.model.compile(dynamic=False)

    def train(self, seed: int) -> dict[int, float]:
        """Return the validation loss at each step at which it was evaluated."""
        recipe, track, ranks = self.recipe, self.track, self.ranks
        self.model.reset(seed)
        optimizers = recipe.optimizers(self.model, recipe.matrix_lr, recipe.matrix_decay)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        batches = self.shards.batches(track.batch_tokens, track.row_tokens, ranks.rank, ranks.count)
        losses: dict[int, float] = {}
        seconds, begin = 0.0, time.perf_counter()
        for step in range(recipe.steps + 1):
            if _evaluates(step, recipe.steps):
                ranks.wait()
                seconds += time.perf_counter() - begin
                losses[step] = evaluate(self.model, self.validation, track, ranks)
                self.log.write(
                    f"step:{step}/{recipe.steps} val_loss:{losses[step]:.5f} "
                    f"train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, step):.2f}ms"
                )
                ranks.wait()
                begin = time.perf_counter()
            if step == recipe.steps:
                break
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * lr_factor(step, recipe)
            inputs, targets = (part.to(ranks.device) for part in next(batches))
            train_step(self.model, optimizers, (inputs, targets), track.rows, ranks)
        return losses


def _evaluates(step: int, steps: int) -> bool:
    """Say whether the validation loss is computed before a step, or after the last."""
    return step == steps or step % (125 if step < 0.9 * steps else 25) == 0


def first_passing_step(trials: Sequence[Mapping[int, float]]) -> int | None:
    """Return the first step at which the trials together pass the track's rule, or None."""
    for step in trials[0]:
        mean = fmean(trial[step] for trial in trials)
        if (TARGET - mean) * math.sqrt(len(trials)) >= MARGIN:
            return step
    return None


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse values out of range."""
    parser = argparse.ArgumentParser(description="The optimization track of modded-nanogpt.")
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/fineweb10B"), help="the folder of the shards")
    add("--recipe", choices=[*RECIPES], default="sinkgd", help="the optimizer; default: sinkgd")
    add("--steps", type=int, help="number of steps, instead of the recipe's")
    add("--matrix-lr", type=float, help="rate of the hidden matrices, instead of the recipe's")
    add("--matrix-decay", type=float, help="weight decay of the matrices, instead of the recipe's")
    add("--trials", type=int, default=1, help="number of runs, each with the next seed")
    add("--seed", type=int, default=0, help="seed of the weights of the first run")
    add("--out", type=Path, default=Path("logs"), help="the folder of the log")
    add("--tiny", action="store_true", help="a tiny model and batch, to test the script")
    given = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("trials", 1), ("seed", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            parser.error(
                f"--{name} must be at least {least}, got {value}; leave it out or raise it"
            )
    for name in ("matrix-lr", "matrix-decay"):
        value = getattr(given, name.replace("-", "_"))
        if value is not None and not 0 <= value < math.inf:
            parser.error(
                f"--{name} must be finite and at least 0, got {value}; leave it out or change it"
            )
    if not given.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU, and the track needs one; pass --tiny for a test on a CPU")
    return given


def joined(track: Track) -> Ranks:
    """Join the ranks that torchrun started; without torchrun, this process is the only rank."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    passes = track.batch_tokens // (track.row_tokens * track.rows)
    if passes % count:
        raise SystemExit(
            f"a batch is {passes} forward passes, which {count} processes cannot share equally; "
            f"give torchrun an --nproc-per-node that divides {passes}"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if count > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return Ranks(int(os.environ.get("RANK", "0")), count, device)


def main(arguments: Sequence[str] | None = None) -> list[dict[int, float]]:
    """Train, and return the validation losses of each trial."""
    given = parsed(arguments)
    track = TINY if given.tiny else TRACK
    names = ("steps", "matrix_lr", "matrix_decay")
    changed = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    recipe = replace(RECIPES[given.recipe], **changed)
    ranks = joined(track)
    try:
        log = Log(given.out, given.recipe, _determining(given, recipe), ranks)
        log.write(f"{'=' * 100}\ntorch {torch.__version__}, {ranks.count} × {_name(ranks.device)}")
        log.write(
            f"{given.recipe}: matrix_lr {recipe.matrix_lr:g}, matrix_decay "
            f"{recipe.matrix_decay:g}, warmup {recipe.warmup:.1%}, first seed {given.seed}\n{track}"
        )
        trainer = Trainer(track, recipe, given.data, ranks, log)
        trials = [trainer.train(given.seed + trial) for trial in range(given.trials)]
        log.write(f"mean val_loss (n={len(trials)}): {fmean(t[recipe.steps] for t in trials):.5f}")
        if track is TRACK:
            step = first_passing_step(trials)
            found = "no step" if step is None else f"step {step}"
            log.write(f"the first to pass (3.28 - mean) * √{len(trials)} >= 0.004: {found}")
    except ShardError as error:
        raise SystemExit(str(error)) from None
    finally:
        if ranks.count > 1:
            dist.destroy_process_group()
    return trials


def _determining(given: argparse.Namespace, recipe: Recipe) -> list[str]:
    """Return the arguments that determine the result of a run, defaults included."""
    values = {
        "recipe": given.recipe,
        "steps": recipe.steps,
        "matrix-lr": recipe.matrix_lr,
        "matrix-decay": recipe.matrix_decay,
        "trials": given.trials,
        "seed": given.seed,
    }
    return [f"--{name}={value}" for name, value in values.items()] + ["--tiny"] * given.tiny


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
