"""Fine-tune a tiny GPT-2 with SinkGD in a loop of accelerate.

AdamW first trains the model on the oldest speeches of the text. SinkGD then fine-tunes it on the
newest. The run accumulates gradients over two batches. It stops half way, saves with `save_state`,
and goes on in new objects after `load_state`. It takes less than a minute on two cores; with
several devices, start the script with `accelerate launch`.

    python examples/accelerate_loop.py
    accelerate launch --mixed_precision bf16 examples/accelerate_loop.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import sinkgd
from small_gpt2 import Material, Result, parse, prepare, report, schedule, show

ACCUMULATED = 2  # batches in a step


def build(accelerator: Accelerator, material: Material, args: argparse.Namespace) -> list[Any]:
    """Return the model as AdamW left it, the optimizer and the schedule, all prepared."""
    model = material.model()
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model, adamw_lr=args.adamw_lr))
    # accelerate steps a schedule once for each process.
    rates = schedule(optimizer, args.steps * accelerator.num_processes)
    return list(accelerator.prepare(model, optimizer, rates))


def train(
    accelerator: Accelerator,
    parts: Sequence[Any],
    material: Material,
    args: argparse.Namespace,
    steps: range,
) -> None:
    """Take some steps on the second part of the text."""
    model, optimizer, rates = parts
    size = max(1, args.batch // ACCUMULATED)
    for batch in range(ACCUMULATED * steps.start, ACCUMULATED * steps.stop):
        with accelerator.accumulate(model):
            seed = batch * accelerator.num_processes + accelerator.process_index
            rows = material.second.batch(size, seed).to(accelerator.device)
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and accelerator.is_main_process:
            show((batch + 1) // ACCUMULATED, args.steps, loss)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example."""
    args = parse(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    material = prepare(args)
    print("SinkGD fine-tunes on the second part")
    half = args.steps // 2
    train(accelerator, build(accelerator, material, args), material, args, range(half))

    folder = Path(args.out) / "accelerate"
    accelerator.save_state(folder)
    print(f"saved {folder}, and resumed from it")
    accelerator.free_memory()
    parts = build(accelerator, material, args)
    accelerator.load_state(folder)

    train(accelerator, parts, material, args, range(half, args.steps))
    model, optimizer, _ = parts
    return report(material, accelerator.unwrap_model(model), optimizer)


if __name__ == "__main__":
    main()
