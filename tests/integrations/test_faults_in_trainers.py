"""Rates, names, checkpoints and gradients in the loops of trainers, as in a loop of one's own."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler

import sinkgd
from same_state import differences
from sinkgd.integrations.transformers import SinkGDFactory, attach

accelerate = pytest.importorskip("accelerate", reason="pip install sinkgd[trainers]")
lightning = pytest.importorskip("lightning", reason="pip install sinkgd[trainers]")
peft = pytest.importorskip("peft", reason="pip install sinkgd[trainers]")
transformers = pytest.importorskip("transformers", reason="pip install sinkgd[transformers]")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers and of what they import

RATE = 1e-2


@pytest.fixture(autouse=True)
def forgotten_process_group():
    forget = accelerate.state.AcceleratorState._reset_state
    forget(reset_partial_state=True)
    yield
    forget(reset_partial_state=True)


def network(tokens=16, width=8):
    """An embedding, a block and a head: matrices, tables and vectors."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width), nn.LayerNorm(width)
    )
    return nn.Sequential(nn.Embedding(tokens, width), block, nn.Linear(width, tokens))


def rows():
    return torch.randint(16, (32, 6), generator=torch.Generator().manual_seed(0))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


class ForTrainer(nn.Module):
    """The network as the Trainer of transformers calls a model."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, tokens):
        return {"loss": loss_of(self.network, tokens)}


class ForLightning(lightning.LightningModule):
    def __init__(self, build, schedule=None):
        super().__init__()
        self.network, self.build, self.schedule = network(), build, schedule

    def training_step(self, tokens, _):
        loss = loss_of(self.network, tokens)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = self.build(self.network)
        if self.schedule is None:
            return optimizer
        made = {"scheduler": self.schedule(optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": made}


def arguments(folder, **options):
    usual = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
    }
    return transformers.TrainingArguments(str(folder), **{**usual, **options})


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows())

    def __getitem__(self, i):
        return {"tokens": rows()[i]}


def by_transformers(folder, build, schedule, steps, spoil):
    model = ForTrainer()
    optimizer = build(model.network)
    made = None if schedule is None else schedule(optimizer)

    class Spoiled(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            loss = super().compute_loss(model, inputs, *args, **options)
            return loss * spoil(self.state.global_step)

    trainer = Spoiled(
        model,
        arguments(folder, max_steps=steps),
        train_dataset=Tokens(),
        optimizers=(optimizer, made),
    )
    trainer.train()
    return model.network, optimizer


def by_accelerate(_, build, schedule, steps, spoil):
    accelerator = accelerate.Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = network()
    optimizer = build(model)
    model, prepared = accelerator.prepare(model, optimizer)
    made = None if schedule is None else accelerator.prepare(schedule(optimizer))
    for step in range(steps):
        loss = loss_of(model, rows()[4 * step : 4 * step + 4]) * spoil(step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        if made is not None:
            made.step(*[float(loss)] * isinstance(made.scheduler, lr_scheduler.ReduceLROnPlateau))
        prepared.zero_grad()
    return model, optimizer


def by_lightning(folder, build, schedule, steps, spoil):
    class Spoiled(ForLightning):
        def training_step(self, tokens, i):
            return super().training_step(tokens, i) * spoil(i)

    module = Spoiled(build, schedule)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=4))
    return module.network, trainer.optimizers[0]


def by_fabric(_, build, schedule, steps, spoil):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = network()
    optimizer = build(model)
    prepared, wrapped = fabric.setup(model, optimizer)
    made = None if schedule is None else schedule(optimizer)
    for step in range(steps):
        loss = loss_of(prepared, rows()[4 * step : 4 * step + 4]) * spoil(step)
        fabric.backward(loss)
        fabric.clip_gradients(prepared, wrapped, max_norm=1.0, error_if_nonfinite=False)
        wrapped.step()
        if made is not None:
            made.step(*[float(loss)] * isinstance(made, lr_scheduler.ReduceLROnPlateau))
        wrapped.zero_grad()
    return model, optimizer


TRAINERS = {
    "transformers": by_transformers,
    "accelerate": by_accelerate,
    "lightning": by_lightning,
    "fabric": by_fabric,
}
every_trainer = pytest.mark.parametrize("trainer", TRAINERS)


def train(trainer, folder, build, schedule=None, steps=3, spoil=lambda _: 1.0):
    """Train in a trainer's own loop; return the network and the optimizer."""
    return TRAINERS[trainer](folder, build, schedule, steps, spoil)


def groups_of(model, rate=RATE):
    """Return three groups, of which two are AdamW's: vectors do not decay."""
    return sinkgd.param_groups(model, adamw_lr=rate, weight_decay=0.1)


def hybrid(model, **options):
    return sinkgd.SinkGD(groups_of(model), **options)


def shares(optimizer):
    """Return each group's rate, divided by the rate that it began with."""
    start = {group["name"]: group["lr"] for group in groups_of(network())}
    return [float(g["lr"]) / start[g["name"]] for g in optimizer.param_groups]


# Rates -------------------------------------------------------------------------------------------

OF_TRANSFORMERS = {
    "linear": None,
    "cosine": None,
    "cosine_with_restarts": None,
    "polynomial": {"lr_end": RATE / 4},
    "constant": None,
    "constant_with_warmup": None,
    "inverse_sqrt": None,
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0, "mode": "max"},
    "cosine_with_min_lr": {"min_lr": RATE / 4},
    "cosine_warmup_with_min_lr": {"min_lr": RATE / 4},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": None,
}


def test_every_schedule_of_transformers_is_tried():
    assert {*OF_TRANSFORMERS} == {kind.value for kind in transformers.SchedulerType}


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_a_schedule_of_the_trainer_scales_every_group_as_adamws(kind, tmp_path):
    evaluated = kind in ("reduce_lr_on_plateau", "greedy")

    def run(**options):
        trainer = transformers.Trainer(
            ForTrainer(),
            arguments(
                tmp_path,
                max_steps=4,
                warmup_steps=0 if kind == "reduce_lr_on_plateau" else 1,
                lr_scheduler_type=kind,
                lr_scheduler_kwargs=OF_TRANSFORMERS[kind],
                eval_strategy="steps" if evaluated else "no",
                eval_steps=1,
                prediction_loss_only=True,
                label_names=["tokens"],
            ),
            train_dataset=Tokens(),
            eval_dataset=torch.utils.data.Subset(Tokens(), range(4)) if evaluated else None,
            **options,
        )
        if not options:
            attach(trainer)
        trainer.train()
        return trainer.optimizer

    torchs = torch.optim.AdamW, {"lr": RATE}
    expected = run(optimizer_cls_and_kwargs=torchs).param_groups[0]["lr"] / RATE
    assert shares(run()) == pytest.approx([expected] * 3)


def of_a_tensor(model):
    return sinkgd.SinkGD(groups_of(model, torch.tensor(RATE)))


@every_trainer
@pytest.mark.parametrize("build", [hybrid, of_a_tensor])
def test_a_plateau_halves_every_rate_once(trainer, build, tmp_path):
    if trainer == "transformers":
        pytest.skip("its Trainer steps a plateau at evaluations; see the schedules above")

    def plateau(optimizer):  # no loss is ever good enough
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)

    _, optimizer = train(trainer, tmp_path, build, plateau)
    assert shares(optimizer) == pytest.approx([0.25] * 3)


def cycle(optimizer, **options):
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, rates, total_steps=6, **options)


@every_trainer
def test_one_cycle_asks_for_cycle_momentum_false(trainer, tmp_path):
    with pytest.raises(ValueError, match="cycle_momentum"):
        train(trainer, tmp_path, hybrid, cycle)


@every_trainer
def test_one_cycle_switches_no_momentum_on(trainer, tmp_path):
    _, optimizer = train(trainer, tmp_path, hybrid, lambda own: cycle(own, cycle_momentum=False))
    assert not any(group.get("momentum") for group in optimizer.param_groups)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


@every_trainer
def test_one_cycle_moves_the_momentum_of_an_optimizer_that_has_it(trainer, tmp_path):
    _, optimizer = train(trainer, tmp_path, lambda model: hybrid(model, momentum=0.5), cycle)
    moved = [
        group["betas"][0] if "betas" in group else group["momentum"]
        for group in optimizer.param_groups
    ]
    assert all(0.85 <= momentum <= 0.95 for momentum in moved)
    assert 0.9 not in moved  # the first of AdamW's betas before
    assert any("momentum_buffer" in state for state in optimizer.state.values())


@every_trainer
def test_a_rate_of_zero_in_a_warm_up_changes_no_weight_and_counts_the_step(trainer, tmp_path):
    def warm_up(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)

    model, optimizer = train(trainer, tmp_path, hybrid, warm_up, steps=2)
    pairs = zip(model.parameters(), network().parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert {float(state["step"]) for state in optimizer.state.values() if state} == {2.0}


def test_the_trial_of_a_search_sets_the_rates(tmp_path):
    """transformers changes the arguments, and builds the model and the optimizer anew."""
    args = arguments(tmp_path, max_steps=1)
    trainer = transformers.Trainer(args=args, train_dataset=Tokens(), model_init=ForTrainer)
    attach(trainer)
    trainer.args.learning_rate = 0.5
    trainer.train()
    found = {group["algorithm"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert found == {"sinkgd": 0.15, "adamw": 0.5}


# Gradients ---------------------------------------------------------------------------------------


@every_trainer
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_batch_is_named_and_reaches_no_weight(trainer, factor, tmp_path):
    made = []

    def build(model):
        made.append(model)
        return hybrid(model)

    with pytest.raises(sinkgd.NonFiniteGradientError, match=r"gradients of 1\.0\.weight"):
        train(trainer, tmp_path, build, spoil=lambda step: factor if step == 1 else 1.0)
    assert all(param.isfinite().all() for param in made[0].parameters())


@every_trainer
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_batch_can_be_skipped(trainer, factor, tmp_path):
    """Clipping by the global norm spreads NaN and infinity to every gradient."""
    model, optimizer = train(
        trainer,
        tmp_path,
        lambda model: hybrid(model, nonfinite="skip"),
        spoil=lambda step: factor if step == 1 else 1.0,
    )
    assert all(param.isfinite().all() for param in model.parameters())
    assert optimizer.skipped()["1.0.weight"] == 1
    assert {float(state["step"]) for state in optimizer.state.values() if state} == {2.0}


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_an_overflow_under_a_gradient_scaler_is_lightnings_to_skip(clipped, tmp_path):
    class Spoiled(ForLightning):
        def training_step(self, tokens, i):
            return super().training_step(tokens, i) * (math.inf if i == 1 else 1.0)

    module = Spoiled(hybrid)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=clipped,
        plugins=[lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=4))
    assert all(param.isfinite().all() for param in module.parameters())
    assert scaler.get_scale() == 2.0
    (steps,) = {float(state["step"]) for state in trainer.optimizers[0].state.values() if state}
    assert steps == 2.0


@pytest.mark.parametrize("option", ["gradient_checkpointing", "torch_compile"])
def test_the_trainer_learns_the_same_with(option, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        data = [{"input_ids": row, "labels": row} for row in rows()]
        trainer = transformers.Trainer(
            model, arguments(tmp_path, max_steps=2, **options), train_dataset=data
        )
        attach(trainer)
        trainer.train()
        return trainer.optimizer.state_dict(), model.state_dict()

    on = {option: True, **({"torch_compile_backend": "eager"} if "compile" in option else {})}
    assert differences(run(**on), run()) == []


@every_trainer
def test_parameters_may_be_frozen_and_unfrozen_between_steps(trainer, tmp_path):
    heads, weights = [], []

    def build(model):
        heads.append(model[2].weight)
        return hybrid(model)

    def freeze(step):  # between the forward and the backward pass: steps 1 and 2 give no gradient
        heads[0].requires_grad_(step != 1)
        weights.append(heads[0].detach().clone())
        return 1.0

    _, optimizer = train(trainer, tmp_path, build, steps=4, spoil=freeze)
    weights.append(heads[0])
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert changed == [True, False, False, True]
    assert float(optimizer.state[heads[0]]["step"]) == 2.0


@every_trainer
def test_parameters_that_were_flattened_are_refused_by_name(trainer, tmp_path):
    """As DeepSpeed's ZeRO-1 and ZeRO-2 exchange them once the optimizer was built."""

    def flatten(optimizer, *_):
        for group in optimizer.param_groups:
            flat = nn.Parameter(torch.cat([param.detach().flatten() for param in group["params"]]))
            flat.grad = torch.ones_like(flat)
            group["params"] = [flat]

    def build(model):
        optimizer = hybrid(model)
        optimizer.register_step_pre_hook(flatten)
        return optimizer

    with pytest.raises(TypeError, match=r"'1\.0\.weight' had shape \(12, 8\).*ZeRO-1"):
        train(trainer, tmp_path, build)


# Arguments that would have no effect -------------------------------------------------------------

IGNORED = {
    "optim": ("adafactor", "optim='adafactor' .* chooses another optimizer"),
    "optim_args": ("scale_parameter=True", "optim_args='scale_parameter=True' .* no effect"),
    "optim_target_modules": ("all-linear", "optim_target_modules='all-linear' .* no effect"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_arguments_of_another_optimizer_are_refused(name, tmp_path):
    value, message = IGNORED[name]
    args = arguments(tmp_path, **{name: value})
    trainer = transformers.Trainer(ForTrainer(), args, train_dataset=Tokens())
    with pytest.raises(ValueError, match=message):
        attach(trainer)
    if name == "optim":
        with pytest.raises(ValueError, match=message):
            SinkGDFactory()(network(), training_args=args)


def test_a_trainer_that_builds_another_optimizer_after_all_is_refused(tmp_path):
    class Own(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
            return self.optimizer

    trainer = Own(ForTrainer(), arguments(tmp_path, max_steps=1), train_dataset=Tokens())
    attach(trainer)
    with pytest.raises(TypeError, match="Own built SGD and not SinkGD"):
        trainer.train()


REFUSED = {
    sinkgd.SWAN: "'swan' updates matrices",
    sinkgd.SCALE: "'mngd' updates matrices",
    sinkgd.MNGD: "norms must name at least one norm",
    sinkgd.SinkGD: "weight_decay=0.1 has no effect",
    sinkgd.SPAM: "weight_decay=0.1 has no effect",
    sinkgd.AdamWSPAM: "weight_decay=0.1 has no effect",
    sinkgd.TemperedSinkGD: "weight_decay=0.1 has no effect",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_groups_of_the_trainer_and_arguments_that_do_not_fit_are_refused(kind, tmp_path):
    """The trainer makes its own groups, which set weight_decay, for a class of optimizers."""
    trainer = transformers.Trainer(
        ForTrainer(),
        arguments(tmp_path),
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=(kind, {"weight_decay": 0.1}),
    )
    with pytest.raises(ValueError, match=REFUSED[kind]):
        trainer.create_optimizer()


def test_two_rates_of_lora_are_set_by_an_override():
    """PEFT's create_loraplus_optimizer gives a rate that every group sets itself."""
    config = peft.LoraConfig(r=2, target_modules=["1.0"])
    model = peft.get_peft_model(network(), config)
    groups = sinkgd.param_groups(model, adamw_lr=RATE, overrides={"lora_B": {"lr": 16 * RATE}})
    optimizer = sinkgd.SinkGD(groups)
    rates = {
        name.split(".")[-3]: group["lr"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert rates == {"lora_A": RATE, "lora_B": 16 * RATE}
    from peft.optimizers import create_loraplus_optimizer

    with pytest.raises(ValueError, match=r"lr=0\.01 has no effect: every group sets its own lr"):
        create_loraplus_optimizer(model, sinkgd.SinkGD, lr=RATE, loraplus_lr_ratio=16)


# Groups and names --------------------------------------------------------------------------------


class Unfreeze(lightning.pytorch.callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.network[:2])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network[:2], optimizer)


def test_lightnings_unfreezing_without_an_algorithm_warns_and_trains(tmp_path):
    module = ForLightning(hybrid)
    before = copy.deepcopy(module.network)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Unfreeze()],
    )
    with pytest.warns(UserWarning, match=r"groups of sinkgd.param_groups\(model, only="):
        trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=8))
    pairs = zip(module.network.parameters(), before.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)


def prepared_by_fabric(model):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return fabric.setup_module(model)


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "fabric": prepared_by_fabric,
    "compiled fabric": lambda model: prepared_by_fabric(torch.compile(model, backend="eager")),
    "accelerate": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_checkpoint_of_fabric_is_loaded_whatever_wraps_the_model(wrapper, tmp_path):
    def optimizer_of(name):
        return hybrid(WRAPPERS[name](network()), momentum=0.5)

    for saved, loaded in ((wrapper, "bare"), ("bare", wrapper)):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        one, other = (optimizer_of(name) for name in (saved, loaded))
        one.init_state()
        fabric.save(tmp_path / "own.ckpt", {"optimizer": fabric.setup_optimizers(one)})
        fabric.load(tmp_path / "own.ckpt", {"optimizer": fabric.setup_optimizers(other)})
        assert len([state for state in other.state.values() if state]) == len(one.state)


# Checkpoints -------------------------------------------------------------------------------------


def other_vocabulary(model):
    del model
    return hybrid(network(tokens=17))


def other_width(model):
    del model
    return hybrid(network(width=10), momentum=0.5)


OTHER = {
    "torch's AdamW": (
        lambda model: torch.optim.AdamW(model.parameters()),
        hybrid,
        "the checkpoint names no algorithm",
    ),
    "another routing": (
        lambda model: sinkgd.SinkGD(model.named_parameters(), lr=RATE),
        hybrid,
        "the checkpoint has 1 parameter groups, this optimizer has 3",
    ),
    "another vocabulary": (hybrid, other_vocabulary, r"'0.weight' has shape \(17, 8\)"),
    "another width": (
        lambda model: hybrid(model, momentum=0.5),
        other_width,
        r"'1.0.weight' has shape \(12, 10\)",
    ),
}


def load_by_transformers(optimizer, folder):
    trainer = transformers.Trainer(ForTrainer(), arguments(folder), optimizers=(optimizer, None))
    trainer.create_optimizer_and_scheduler(1)
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    trainer._load_optimizer_and_scheduler(str(folder))


def load_by_accelerate(optimizer, folder):
    prepared = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    prepared.load_state_dict(torch.load(folder / "optimizer.pt"))


def load_by_lightning(optimizer, folder):
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.optimizers = [optimizer]
    saved = torch.load(folder / "optimizer.pt")
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": [saved]})


def load_by_fabric(optimizer, folder):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.load_raw(folder / "optimizer.pt", fabric.setup_optimizers(optimizer))


LOADERS = {
    "transformers": load_by_transformers,
    "accelerate": load_by_accelerate,
    "lightning": load_by_lightning,
    "fabric": load_by_fabric,
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("trainer", LOADERS)
def test_the_state_of_another_optimizer_or_model_is_refused(trainer, case, tmp_path):
    """By what each trainer calls to load the optimizer."""
    build, rebuild, message = OTHER[case]
    model = network()
    saved, other = build(model), rebuild(network())
    loss_of(model, rows()).backward()
    saved.step()
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=message):
        LOADERS[trainer](other, tmp_path)


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def for_fsdp2(kind):
    """Return an Accelerator that shards by FSDP2, which it does on GPUs alone if not told to."""
    accelerator = accelerate.Accelerator(cpu=True)
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1,
        state_dict_type=kind,
    )
    sharded = accelerate.utils.DistributedType.FSDP
    accelerate.state.PartialState._shared_state["distributed_type"] = sharded
    accelerator.state.distributed_type = sharded
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator


SHARDED = {
    "hybrid": hybrid,
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=RATE),
    "momentum": lambda model: hybrid(model, momentum=0.5),
}


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("recipe", SHARDED)
@pytest.mark.parametrize("has_gradients", [True, False])
def test_accelerates_checkpoint_of_fsdp2_goes_on(one_rank, has_gradients, recipe, kind, tmp_path):
    """Its calls leave torch's options strict, and save while gradients exist."""
    del one_rank

    def run(steps, *, save=False, load=False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = for_fsdp2(kind)
        model = network()
        model, optimizer = accelerator.prepare(model, SHARDED[recipe](model))
        if load:
            accelerator.load_state(tmp_path / "saved")
        for step in steps:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, rows()[4 * step : 4 * step + 4]))
            optimizer.step()
            if not has_gradients:
                optimizer.zero_grad()
            if save and step == 1:
                accelerator.save_state(tmp_path / "saved")
        return [param.full_tensor().detach() for param in model.parameters()]

    expected = run(range(4), save=True)
    assert differences(run(range(2, 4), load=True), expected) == []


def test_a_prepared_optimizer_can_be_copied():
    def step(model, optimizer):
        loss_of(model, rows()).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = network()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, hybrid(model))
    step(model, optimizer)
    other, copied = copy.deepcopy((model, optimizer))
    step(model, optimizer)
    step(other, copied)
    assert differences(other.state_dict(), model.state_dict()) == []
    assert differences(copied.state_dict(), optimizer.state_dict()) == []
