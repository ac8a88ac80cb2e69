"""Fine-tune a tiny GPT-2 with SinkGD in a plain torch loop.

AdamW first trains the model on the oldest speeches of the text. SinkGD then fine-tunes it on the
newest, at rates that follow from the rate that AdamW would get. The run stops half way, saves, and
goes on in a new model and a new optimizer. It takes less than a minute on two cores.

    python examples/torch_loop.py
    python examples/torch_loop.py --text notes.txt --adamw-lr 5e-4
    python examples/torch_loop.py --text notes.txt --adamw-lr 1e-5 --checkpoint path/to/model
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

import sinkgd
from small_gpt2 import Material, Result, parse, prepare, report, schedule, show


def build(
    material: Material, args: argparse.Namespace
) -> tuple[PreTrainedModel, sinkgd.SinkGD, LambdaLR]:
    """Return the model before fine-tuning, the optimizer and the schedule."""
    model = material.model()
    groups = sinkgd.param_groups(model, adamw_lr=args.adamw_lr, weight_decay=0.01)
    optimizer = sinkgd.SinkGD(groups)
    return model, optimizer, schedule(optimizer, args.steps)


def train(
    model: PreTrainedModel,
    optimizer: sinkgd.SinkGD,
    rates: LambdaLR,
    material: Material,
    args: argparse.Namespace,
    steps: range,
) -> None:
    """Take some steps on the second part of the text."""
    for step in steps:
        rows = material.second.batch(args.batch, step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        show(step + 1, args.steps, loss)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example."""
    args = parse(__doc__, argv)
    material = prepare(args)
    print("SinkGD fine-tunes on the second part. Where each parameter goes, and why:")
    print(sinkgd.describe_param_groups(material.model(), adamw_lr=args.adamw_lr))
    model, optimizer, rates = build(material, args)
    half = args.steps // 2
    train(model, optimizer, rates, material, args, range(half))

    path = Path(args.out) / "torch_loop.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([own.state_dict() for own in (model, optimizer, rates)], path)
    print(f"saved {path}, and resumed from it")
    model, optimizer, rates = build(material, args)
    for own, state in zip((model, optimizer, rates), torch.load(path), strict=True):
        own.load_state_dict(state)

    train(model, optimizer, rates, material, args, range(half, args.steps))
    return report(material, model, optimizer)


if __name__ == "__main__":
    main()
