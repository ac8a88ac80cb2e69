"""The real Trainer trains real LLaMA and GPT-2 models with the factory."""

import inspect
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import sinkgd
from same_state import differences
from sinkgd.integrations.transformers import SinkGDFactory, attach

transformers = pytest.importorskip("transformers", reason="pip install sinkgd[transformers]")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def where(model):
    return {
        name: (group["algorithm"], group.get("layout"), group.get("split"))
        for group in sinkgd.param_groups(model)
        for name, _ in group["params"]
    }


def test_llama_routes_linears_of_layers_and_nothing_else():
    found = where(llama())
    matrices = {name for name, (algorithm, *_) in found.items() if algorithm == "sinkgd"}
    projections = [f"self_attn.{p}_proj" for p in "qkvo"]
    projections += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert matrices == {f"model.layers.{i}.{p}.weight" for i in range(2) for p in projections}
    assert found["lm_head.weight"][0] == found["model.embed_tokens.weight"][0] == "adamw"


def test_gpt2_transposes_conv1d_splits_qkv_and_counts_the_tied_head_once():
    found = where(gpt2())
    assert found["transformer.wte.weight"][0] == found["transformer.wpe.weight"][0] == "adamw"
    assert "lm_head.weight" not in found
    for i in range(2):
        block = f"transformer.h.{i}"
        assert found[f"{block}.attn.c_attn.weight"] == ("sinkgd", "transposed", 3)
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            assert found[f"{block}.{name}.weight"] == ("sinkgd", "transposed", 1)
            assert found[f"{block}.{name}.bias"][0] == "adamw"


def test_gpt2_takes_the_step_of_out_by_in_matrices():
    weight = gpt2().transformer.h[0].attn.c_attn.weight
    weight.grad = torch.randn_like(weight)
    start = weight.detach().clone()
    group = {"params": [weight], "algorithm": "sinkgd", "layout": "transposed", "split": 3}
    sinkgd.SinkGD([group], lr=1.0).step()
    for part in range(3):
        columns = slice(32 * part, 32 * (part + 1))
        expected = sinkgd.sr_sinkhorn(weight.grad[:, columns].T).T
        torch.testing.assert_close(
            (start - weight.detach())[:, columns], expected, atol=1e-5, rtol=0
        )


class Rows(torch.utils.data.Dataset):
    """Counting sequences, which a tiny model learns within a few steps."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        row = (torch.arange(16) + i) % 64
        return {"input_ids": row, "labels": row}


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_trainer_trains_saves_and_resumes(build, tmp_path):
    def trainer(steps):
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=16,
            save_steps=20,
            logging_steps=10,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            lr_scheduler_type="constant",
        )
        return transformers.Trainer(
            build(),
            args,
            train_dataset=Rows(),
            optimizer_cls_and_kwargs=(SinkGDFactory, {"lr": 0.02, "sinkhorn_iterations": 3}),
        )

    whole = trainer(40)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    optimizer = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert isinstance(optimizer, sinkgd.SinkGD)
    assert optimizer.param_groups[0]["sinkhorn_iterations"] == 3

    resumed = trainer(40)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    for own, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, other)


RESUMED = {
    "mixed": (torch.float32, {"bf16": True}, {}),
    "bfloat16": (torch.bfloat16, {}, {"rounding": "stochastic", "seed": 3}),
    "momentum": (torch.float32, {}, {"momentum": 0.9, "deflated_rank": 0}),
}


@pytest.mark.filterwarnings("ignore")  # of the trainer and of what it imports
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case, tmp_path):
    """With a schedule, accumulation and clipping, and the best model at the end."""
    dtype, precision, options = RESUMED[case]

    def run(folder, **resumed):
        args = arguments(
            folder,
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            warmup_steps=2,
            lr_scheduler_type="cosine",
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            disable_tqdm=True,
            **precision,
        )
        trainer = transformers.Trainer(
            llama().to(dtype),
            args,
            train_dataset=Rows(),
            eval_dataset=torch.utils.data.Subset(Rows(), range(8)),
            optimizer_cls_and_kwargs=(SinkGDFactory, {"training_args": args, **options}),
        )
        trainer.train(**resumed)
        assert {param.dtype for param in trainer.model.parameters()} == {dtype}
        own = (trainer.model, trainer.optimizer, trainer.lr_scheduler)
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        return [state.state_dict() for state in own], losses

    expected, losses = run(tmp_path / "whole")
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "again/checkpoint-3")
    found, after = run(tmp_path / "again", resume_from_checkpoint=True)
    assert differences(found, expected) == []
    assert after == losses
    saved, again = (
        torch.load(tmp_path / folder / "checkpoint-6/optimizer.pt", weights_only=True)
        for folder in ("whole", "again")
    )
    assert differences(again, saved) == []
    assert differences(saved, expected[1]) == []


def test_an_optimizer_can_be_handed_over_too(tmp_path):
    model = llama()
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


UNKNOWN = {
    "learning_rate": ("0.1", "To fine-tune, give AdamW's rate as adamw_lr, or pass"),
    "deflate_rank": ("3", "'deflate_rank'; did you mean 'deflated_rank'?"),
    "optim_args": (
        "deflated_rank=3, betas=(0.9, 0.95)",
        "(SinkGDFactory, {'deflated_rank': '3', 'betas': '(0.9, 0.95)'})",
    ),
}


@pytest.mark.parametrize("argument", UNKNOWN)
def test_an_unknown_argument_is_refused_with_the_right_form(argument):
    value, remedy = UNKNOWN[argument]
    with pytest.raises(TypeError) as caught:
        SinkGDFactory()(llama(), **{argument: value})
    assert f"SinkGDFactory has no argument '{argument}'" in str(caught.value)
    assert remedy in str(caught.value)


def test_the_trainer_that_builds_the_optimizer_without_the_factory_warns(tmp_path):
    def trainer(**options):
        return transformers.Trainer(
            llama(),
            arguments(tmp_path),
            train_dataset=Rows(),
            optimizer_cls_and_kwargs=(sinkgd.SinkGD, options),
        )

    with pytest.warns(UserWarning, match=r"SinkGD\(sinkgd.param_groups\(model\)\)") as caught:
        trainer().create_optimizer()
    (own,) = [one for one in caught if "sinkgd" in str(one.message)]  # the trainer may warn, too
    assert "transformers" in own.filename  # what called the optimizer
    # The remedy takes the learning_rate that the trainer was given, and not a rate of its own.
    remedy = re.search(r"optimizer_cls_and_kwargs=\((?:\w+\.)*(\w+), (\{.*?\})\)", str(own.message))
    args = arguments(tmp_path, learning_rate=2e-5)
    kwargs = {
        name: {"args": args}[value] for name, value in re.findall(r'"(\w+)": (\w+)', remedy[2])
    }
    factory = getattr(sinkgd.integrations.transformers, remedy[1])
    assert rates(factory()(llama(), **kwargs)) == {"sinkgd": 0.3 * 2e-5, "adamw": 2e-5}
    trainer(lr=1e-3).create_optimizer()


def test_an_instance_of_the_factory_is_refused_with_the_right_call(tmp_path):
    trainer = transformers.Trainer(
        llama(),
        arguments(tmp_path),
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(SinkGDFactory(), {"lr": 0.02}),
    )
    with pytest.raises(TypeError, match=r"without parentheses: .*=\(SinkGDFactory, \{"):
        trainer.create_optimizer()


def rates(optimizer):
    return {group["algorithm"]: group["lr"] for group in optimizer.param_groups}


def arguments(tmp_path, **options):
    return transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)


@pytest.mark.parametrize("is_keyword", [True, False])
def test_training_arguments_are_those_of_adamw(tmp_path, is_keyword):
    adam = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125}
    args = arguments(tmp_path, learning_rate=0.5, weight_decay=0.25, **adam)

    def build(**options):
        if is_keyword:  # as {"training_args": args} among the Trainer's optimizer kwargs
            return SinkGDFactory()(llama(), training_args=args, **options)
        return SinkGDFactory()(llama(), args, **options)  # as axolotl does

    assert rates(build()) == {"sinkgd": 0.3 * 0.5, "adamw": 0.5}
    # A step decays all weights alike.
    decays = {group["lr"] * group["weight_decay"] for group in build().param_groups}
    assert decays == {0.125, 0.0}
    (of_vectors, of_tables) = (group for group in build().param_groups if "betas" in group)
    for group in (of_vectors, of_tables):
        assert (group["betas"], group["eps"]) == ((0.5, 0.75), 0.125)
    assert build().defaults["lr"] == 0.5
    assert rates(build(adamw_lr=0.125)) == {"sinkgd": 0.3 * 0.125, "adamw": 0.125}
    assert rates(build(lr=None, matrix_lr_scale="none")) == {"sinkgd": 0.3 * 0.5, "adamw": 0.5}
    assert {group["weight_decay"] for group in build(weight_decay=0.0).param_groups} == {0.0}
    assert build(betas=(0.8, 0.9)).param_groups[-1]["betas"] == (0.8, 0.9)
    assert build(eps=1e-6).param_groups[-1]["eps"] == 1e-6


def attached(args, **options):
    """What `attach` makes the trainer build."""
    trainer = transformers.Trainer(llama(), args, train_dataset=Rows())
    attach(trainer, **options)
    return trainer.create_optimizer()


WAYS = {
    "factory": lambda args, **options: SinkGDFactory()(llama(), training_args=args, **options),
    "by place": lambda args, **options: SinkGDFactory()(llama(), args, **options),
    "attach": attached,
}
OF_NEW_MODELS = {"lr": 0.04, "matrix_lr_scale": 0.1}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("option", OF_NEW_MODELS)
@pytest.mark.parametrize("kind", [float, str])
def test_a_rate_of_a_new_model_is_refused_beside_learning_rate(tmp_path, way, option, kind):
    args, value = arguments(tmp_path, learning_rate=2e-5), OF_NEW_MODELS[option]
    remedy = rf"Leave out {option}; .*new model .*leave out training_args: .*{option!r}: {value}"
    with pytest.raises(ValueError, match=rf"learning_rate=2e-05 .*{option}={value} .*{remedy}"):
        WAYS[way](args, **{option: kind(value)})


def test_a_rate_of_a_new_model_is_taken_where_nothing_else_sets_it():
    assert rates(SinkGDFactory()(llama(), lr=0.5)) == {"sinkgd": 0.025 * 0.5, "adamw": 0.5}
    betas = SimpleNamespace(adam_beta1=0.5, adam_beta2=0.75)
    optimizer = SinkGDFactory()(llama(), training_args=betas, matrix_lr_scale=0.5)
    assert rates(optimizer) == {"sinkgd": 0.5 * 0.08, "adamw": 0.08}
    assert optimizer.param_groups[-1]["betas"] == (0.5, 0.75)


def test_training_arguments_of_none_are_refused(tmp_path):
    for build in (
        lambda: SinkGDFactory()(llama(), training_args=None),
        lambda: SinkGDFactory()(llama(), None),
        lambda: attached(arguments(tmp_path), training_args=None),
    ):
        with pytest.raises(TypeError, match=r"pass the arguments .*\{'training_args': args\}"):
            build()


def test_a_trainer_with_a_factory_of_its_own_is_not_attached(tmp_path):
    chosen = (SinkGDFactory, {"lr": 0.04})
    trainer = transformers.Trainer(
        llama(), arguments(tmp_path), train_dataset=Rows(), optimizer_cls_and_kwargs=chosen
    )
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"optimizer_cls_and_kwargs=.*'lr': 0\.04.*leave it out"
        ):
            attach(trainer)
    assert trainer.optimizer_cls_and_kwargs == chosen


def test_the_log_of_the_trainer_tells_the_rates_of_groups_apart(tmp_path):
    class NamedRates(transformers.Trainer):  # as in docs/trainers.md
        def log(self, logs, *args, **kwargs):
            if "learning_rate" in logs:
                groups = self.optimizer.param_groups
                logs |= {f"learning_rate/{group['name']}": group["lr"] for group in groups}
            super().log(logs, *args, **kwargs)

    trainer = NamedRates(
        llama(),
        arguments(
            tmp_path,
            max_steps=2,
            logging_steps=1,
            lr_scheduler_type="linear",
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(SinkGDFactory, {"adamw_lr": 1e-2, "weight_decay": 0.1}),
    )
    trainer.train()
    prefix = "learning_rate/"
    rows = [row for row in trainer.state.log_history if "loss" in row]
    logged = [
        {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
        for row in rows
    ]
    expected = {"matrices": 3e-3, "embeddings-head": 1e-2, "vectors": 1e-2}
    after = [pytest.approx({k: x * share for k, x in expected.items()}) for share in (0.5, 0)]
    assert logged == after
    # The rate of the matrices in the step that was taken, which is in the line before.
    assert [row["learning_rate"] for row in rows] == pytest.approx([3e-3, logged[0]["matrices"]])
    names = [group["name"] for group in trainer.optimizer.state_dict()["param_groups"]]
    assert names == [*expected]


def test_without_training_arguments_the_rates_are_those_of_param_groups():
    expected = sinkgd.SinkGD(sinkgd.param_groups(llama()))
    assert rates(SinkGDFactory()(llama())) == rates(expected)


STRINGS = {
    "lr": ("0.5", 0.5),
    "weight_decay": ("1e-1", 0.1),
    "betas": ("(0.8, 0.9)", (0.8, 0.9)),
    "eps": ("1e-6", 1e-6),
    "deflated_rank": ("2", 2),
    "sinkhorn_iterations": ("3", 3),
    "momentum": ("0.5", 0.5),
    "tol": ("1e-3", 1e-3),
    "maximize": ("true", True),
    "rounding": ("stochastic", "stochastic"),
    "backend": ("eager", "eager"),
    "seed": ("7", 7),
    "nonfinite": ("skip", "skip"),
}


@pytest.mark.parametrize("option", STRINGS)
def test_strings_are_read_as_their_values(option):
    text, value = STRINGS[option]
    optimizer = SinkGDFactory()(llama(), **{option: text})
    found = [group[option] for group in optimizer.param_groups if option in group]
    assert value in found


def test_a_string_may_be_adamws_rate():
    found = rates(SinkGDFactory()(llama(), adamw_lr="1e-5"))
    assert found == {"sinkgd": pytest.approx(3e-6), "adamw": 1e-5}


def test_every_argument_of_the_optimizer_may_be_a_string():
    model = llama()
    plain = SinkGDFactory()(model)
    for name, parameter in inspect.signature(sinkgd.SinkGD).parameters.items():
        if name != "params":
            optimizer = SinkGDFactory()(model, **{name: str(parameter.default)})
            for own, expected in zip(optimizer.param_groups, plain.param_groups, strict=True):
                assert own.get(name) == expected.get(name)


@pytest.mark.parametrize("option", ["lr", "betas", "sinkhorn_iterations", "eps"])
def test_a_string_that_is_no_value_is_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{option} must be a number.*got 'fast'"):
        SinkGDFactory()(llama(), **{option: "fast"})


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_checkpoint_of_the_trainers_adamw_continues(tmp_path):
    options = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-3, "weight_decay": 0.1}
    model = llama()
    trainer = transformers.Trainer(model, arguments(tmp_path, **options), train_dataset=Rows())
    trainer.train()
    state_dict = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(ValueError, match="2 groups and no names; pass names"):
        sinkgd.from_adamw_state(model, state_dict)
    decayed = trainer.get_decay_parameter_names(model)  # as in docs/from-adamw.md
    names = sorted(dict(model.named_parameters()), key=lambda name: name not in decayed)
    with pytest.warns(UserWarning, match=r"rate in state_dict is 0 .*: 0\.001\).*Pass adamw_lr"):
        optimizer = sinkgd.from_adamw_state(model, state_dict, names)
    moments = {name: trainer.optimizer.state[p] for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state.get(param, {})
            assert bool(state) == (group["algorithm"] == "adamw")
            for key, value in state.items():
                assert torch.equal(value, moments[name][key])
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3, 0.3 * 1e-3}
