"""Fine-tune a tiny GPT-2 with SinkGD in the Hugging Face Trainer.

AdamW first trains the model on the oldest speeches of the text. The Trainer then fine-tunes it on
the newest: its `learning_rate` and `weight_decay` mean what they mean for AdamW, and SinkGD's rates
follow from them. The log has the rate of each group of parameters. The run stops half way, and a
new Trainer goes on from its checkpoint. It takes less than a minute on two cores.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --adamw-lr 5e-4 --steps 200
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from sinkgd.integrations.transformers import SinkGDFactory
from small_gpt2 import Material, Result, StopAfter, parse, prepare, report


class NamedRates(Trainer):
    """Logs the rate of each group; the Trainer itself logs only the rate of the matrices."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the rates of the next step."""
        if "learning_rate" in logs:
            groups = self.optimizer.param_groups
            logs |= {f"learning_rate/{group['name']}": group["lr"] for group in groups}
        super().log(logs, *args, **kwargs)


def build(material: Material, args: argparse.Namespace, *callbacks: TrainerCallback) -> Trainer:
    """Return a trainer of the model as AdamW left it."""
    training = TrainingArguments(
        str(Path(args.out) / "hf_trainer"),
        learning_rate=args.adamw_lr,
        weight_decay=0.01,
        max_steps=args.steps,
        warmup_steps=0.1,  # a tenth of the steps; before transformers 5, write warmup_ratio=0.1
        per_device_train_batch_size=args.batch,
        logging_steps=max(1, args.steps // 10),
        save_steps=args.steps,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return NamedRates(
        material.model(),
        training,
        train_dataset=[{"input_ids": row, "labels": row} for row in material.second.train],
        optimizer_cls_and_kwargs=(SinkGDFactory, {"training_args": training}),
        callbacks=[*callbacks],
    )


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example."""
    args = parse(__doc__, argv)
    material = prepare(args)
    print("SinkGD fine-tunes on the second part")
    half = max(1, args.steps // 2)
    build(material, args, StopAfter(half)).train()

    folder = Path(args.out) / "hf_trainer" / f"checkpoint-{half}"
    print(f"saved {folder}, and resumed from it")
    trainer = build(material, args)
    trainer.train(resume_from_checkpoint=str(folder))
    return report(material, trainer.model, trainer.optimizer)


if __name__ == "__main__":
    main()
