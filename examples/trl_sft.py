"""Fine-tune a tiny GPT-2 with SinkGD in TRL's SFTTrainer.

AdamW first trains the model on the oldest speeches of the text. TRL then fine-tunes it on passages
of the newest. `attach` makes a trainer of TRL use SinkGD, and takes the `learning_rate` of its
configuration as the rate that AdamW would get; DPO, KTO and GRPO work in the same way. The run
stops half way, and a new trainer goes on from its checkpoint. It takes about a minute on two cores.

    python examples/trl_sft.py
    python examples/trl_sft.py --adamw-lr 5e-4 --steps 200
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from sinkgd.integrations.transformers import attach
from small_gpt2 import Material, Result, StopAfter, parse, prepare, report


def build(material: Material, args: argparse.Namespace, *callbacks: TrainerCallback) -> SFTTrainer:
    """Return a trainer of the model as AdamW left it."""
    needed = material.second.train[: args.steps * args.batch]
    trainer = SFTTrainer(
        material.model(),
        args=SFTConfig(
            str(Path(args.out) / "trl_sft"),
            learning_rate=args.adamw_lr,
            max_steps=args.steps,
            warmup_steps=0.1,  # a tenth of the steps; before transformers 5, write warmup_ratio=0.1
            max_length=args.length,
            per_device_train_batch_size=args.batch,
            logging_steps=max(1, args.steps // 10),
            save_steps=args.steps,
            disable_tqdm=True,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"text": material.tokenizer.batch_decode(needed)}),
        processing_class=material.tokenizer,
        callbacks=[*callbacks],
    )
    attach(trainer, weight_decay=0.01)  # options of SinkGDFactory, such as deflated_rank=0
    return trainer


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example."""
    args = parse(__doc__, argv)
    material = prepare(args)
    print("SinkGD fine-tunes on the second part")
    half = max(1, args.steps // 2)
    build(material, args, StopAfter(half)).train()

    folder = Path(args.out) / "trl_sft" / f"checkpoint-{half}"
    print(f"saved {folder}, and resumed from it")
    trainer = build(material, args)
    trainer.train(resume_from_checkpoint=str(folder))
    return report(material, trainer.model, trainer.optimizer)


if __name__ == "__main__":
    main()
