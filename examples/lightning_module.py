"""Fine-tune a tiny GPT-2 with SinkGD in Lightning.

AdamW first trains the model on the oldest speeches of the text. Lightning then fine-tunes it on the
newest; `configure_optimizers` returns SinkGD at rates that follow from the rate that AdamW would
get. `LearningRateMonitor` writes the rate of each group of parameters under its name. The run stops
half way, and a new Trainer goes on from its checkpoint. It takes less than a minute on two cores.

    python examples/lightning_module.py
    python examples/lightning_module.py --adamw-lr 5e-4 --steps 200
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import sinkgd
from small_gpt2 import Material, Result, parse, prepare, report, schedule, show


class FineTuning(lightning.LightningModule):
    """The model as AdamW left it, its loss, its optimizer and its schedule."""

    def __init__(self, material: Material, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.args = material.model(), args

    def training_step(self, rows: Tensor, _: int) -> Tensor:
        """Return the loss on a batch."""
        loss: Tensor = self.model(input_ids=rows, labels=rows).loss
        show(self.global_step + 1, self.args.steps, loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return SinkGD, and a schedule that scales the rate of every group."""
        groups = sinkgd.param_groups(self, adamw_lr=self.args.adamw_lr, weight_decay=0.01)
        optimizer = sinkgd.SinkGD(groups)
        rates = schedule(optimizer, self.args.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def build(args: argparse.Namespace, epochs: int) -> lightning.Trainer:
    """Return a trainer that stops after some epochs; each epoch has half of the steps."""
    folder = Path(args.out) / "lightning"
    return lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder),
        log_every_n_steps=max(1, args.steps // 10),
        callbacks=[LearningRateMonitor("step")],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the example."""
    args = parse(__doc__, argv)
    material = prepare(args)
    # A checkpoint at the end of an epoch needs no loader that can be resumed.
    half = max(1, args.steps // 2)
    rows = material.second.train
    sampler = RandomSampler(rows, num_samples=half * args.batch)
    loader = DataLoader(rows, batch_size=args.batch, sampler=sampler)
    print("SinkGD fine-tunes on the second part")
    first = build(args, epochs=1)
    first.fit(FineTuning(material, args), loader)

    path = Path(args.out) / "lightning" / "half.ckpt"
    first.save_checkpoint(path)
    print(f"saved {path}, and resumed from it")
    module = FineTuning(material, args)
    second = build(args, epochs=2)
    second.fit(module, loader, ckpt_path=path)

    (optimizer,) = second.optimizers
    for group in optimizer.param_groups:
        print(f"  {group['name']}: {group['initial_lr']:g}, which the schedule scales")
    return report(material, module.model, optimizer)


if __name__ == "__main__":
    main()
