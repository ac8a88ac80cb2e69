"""Lightning's Trainer and Fabric train with SinkGD as with any torch optimizer."""

import pytest
import torch
from torch import nn

import sinkgd
from same_state import differences

lightning = pytest.importorskip("lightning", reason="pip install sinkgd[trainers]")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning and of what it imports


def network():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(32, 16), body, nn.Linear(16, 32))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def loader():
    rows = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(rows, batch_size=8)


class Module(lightning.LightningModule):
    """A language model whose optimizer and scheduler are configured as Lightning asks for it."""

    def __init__(self, **options):
        super().__init__()
        self.network, self.options, self.losses = network(), options, []

    def training_step(self, tokens, _):
        loss = loss_of(self.network, tokens)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self):
        optimizer = sinkgd.SinkGD(sinkgd.param_groups(self, adamw_lr=1e-2), **self.options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(folder, **options):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"logger": False, **options},
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_trains_with_clipping_and_accumulation(tmp_path, precision, accumulated):
    module = Module()
    trainer(
        tmp_path,
        max_epochs=2,
        precision=precision,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulated,
        enable_checkpointing=False,
    ).fit(module, loader())
    assert module.losses[-1] < 0.8 * module.losses[0]


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    whole = Module(**options)
    trainer(tmp_path / "whole", max_epochs=2, enable_checkpointing=False).fit(whole, loader())
    first = trainer(tmp_path / "first", max_epochs=1)
    first.fit(Module(**options), loader())
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    second = Module(**options)
    trainer(tmp_path / "second", max_epochs=2, enable_checkpointing=False).fit(
        second, loader(), ckpt_path=path, weights_only=False
    )
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_checkpoint_within_an_epoch_goes_on_bit_for_bit(tmp_path, precision, weights_only):
    """As ModelCheckpoint writes it, with accumulation and clipping; the optimizer's state, too."""

    class ByIndex(Module):  # Lightning goes on with the next index, and its loader begins again
        def training_step(self, _, i):
            rows = torch.randint(32, (8, 8), generator=torch.Generator().manual_seed(i))
            return super().training_step(rows, i)

    def run(**options):
        module = ByIndex(**({"rounding": "stochastic"} if precision == "bf16-true" else {}))
        every = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1
        )
        made = trainer(
            tmp_path,
            max_steps=6,
            precision=precision,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            callbacks=[every],
        )
        made.fit(module, loader(), **options)
        (schedule,) = (config.scheduler for config in made.lr_scheduler_configs)
        states = [own.state_dict() for own in (module, made.optimizers[0], schedule)]
        return states, len(module.losses)

    expected, number = run()
    found, rest = run(ckpt_path=tmp_path / "step=3.ckpt", weights_only=weights_only)
    assert (number, rest) == (12, 6)
    assert differences(found, expected) == []


def test_the_monitor_of_rates_calls_each_group_by_its_name(tmp_path):
    monitor = lightning.pytorch.callbacks.LearningRateMonitor("step", log_weight_decay=True)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    module = Module()
    trainer(
        tmp_path,
        max_steps=3,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[monitor],
        enable_checkpointing=False,
    ).fit(module, loader())
    logger.save()
    groups = {group["name"]: group for group in sinkgd.param_groups(module, adamw_lr=1e-2)}
    assert len(groups) == 3
    assert monitor.lrs == {
        f"lr-SinkGD/{name}": [pytest.approx(0.99**step * group["lr"]) for step in range(3)]
        for name, group in groups.items()
    }
    written = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert {f"lr-SinkGD/{name}" for name in groups} <= {*written.split(",")}


def test_the_monitor_knows_groups_that_a_callback_unfreezes(tmp_path):
    """Lightning refuses two groups of one name."""

    class Unfreeze(lightning.pytorch.callbacks.BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.network[1])

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.make_trainable(module.network[1])
                part = module.network[1].parameters()
                for group in sinkgd.param_groups(module, adamw_lr=1e-2, only=part):
                    optimizer.add_param_group(group)

    class Plain(Module):
        def configure_optimizers(self):
            return sinkgd.SinkGD(sinkgd.param_groups(self, adamw_lr=1e-2))

    monitor = lightning.pytorch.callbacks.LearningRateMonitor("step")
    module = Plain()
    trainer(
        tmp_path,
        max_epochs=2,
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        log_every_n_steps=1,
        callbacks=[Unfreeze(), monitor],
        enable_checkpointing=False,
    ).fit(module, loader())
    names = ["matrices-split-3", "matrices", "vectors"]
    assert {f"lr-SinkGD/{name}" for name in names} <= {*monitor.lrs}
    assert module.losses[-1] < module.losses[0]


def test_a_model_that_fabric_has_set_up_is_routed_as_before():
    model = network()
    expected = [
        ({param for _, param in group.pop("params")}, group) for group in sinkgd.param_groups(model)
    ]
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    for made in (fabric.setup_module(model), fabric.setup(torch.compile(model))):
        found = sinkgd.param_groups(made)
        assert [({param for _, param in group.pop("params")}, group) for group in found] == expected


def test_fabric_sets_up_and_steps():
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = network()
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model, adamw_lr=1e-2))
    model, optimizer = fabric.setup(model, optimizer)
    losses = []
    for _ in range(2):
        for tokens in fabric.setup_dataloaders(loader()):
            loss = loss_of(model, tokens)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
