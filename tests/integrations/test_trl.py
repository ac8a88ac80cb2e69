"""TRL's own trainers train with SinkGD after `attach`, at the rate that AdamW would get."""

import pytest
import torch

import sinkgd
from sinkgd.integrations.transformers import SinkGDFactory, attach

transformers = pytest.importorskip("transformers", reason="pip install sinkgd[transformers]")
trl = pytest.importorskip("trl", reason="pip install sinkgd[trainers]")
datasets = pytest.importorskip("datasets", reason="pip install sinkgd[trainers]")
tokenizers = pytest.importorskip("tokenizers", reason="pip install sinkgd[lab]")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and of what it imports

WORDS = ["one", "two", "three", "four", "good", "bad", "plus", "is"]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a model. TRL reads the model of reference from there."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


COMMON = {
    "learning_rate": 1e-2,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}
TEXTS = [{"text": f"{a} plus {b} is {b} {a}"} for a in WORDS[:4] for b in WORDS[:4]]
PREFERRED = [
    {"prompt": f"{a} is", "chosen": " good good", "rejected": " bad bad"} for a in WORDS[:4]
] * 4
LABELED = [
    {"prompt": f"{a} is", "completion": f" {word}", "label": word == "good"}
    for a in WORDS[:4]
    for word in ("good", "bad")
] * 2


def of(rows):
    return datasets.Dataset.from_list(rows)


def sft(model, tokenizer, folder):
    args = trl.SFTConfig(str(folder), max_length=32, **COMMON)
    return trl.SFTTrainer(model, args=args, train_dataset=of(TEXTS), processing_class=tokenizer)


def dpo(model, tokenizer, folder):
    args = trl.DPOConfig(str(folder), max_length=32, **COMMON)
    return trl.DPOTrainer(model, args=args, train_dataset=of(PREFERRED), processing_class=tokenizer)


def kto(model, tokenizer, folder):
    args = trl.KTOConfig(str(folder), max_length=32, **COMMON)
    return trl.KTOTrainer(model, args=args, train_dataset=of(LABELED), processing_class=tokenizer)


def says_good(completions, **_):
    return [float("good" in text) for text in completions]


def grpo(model, tokenizer, folder):
    args = trl.GRPOConfig(
        str(folder), num_generations=4, max_completion_length=4, **{**COMMON, "max_steps": 6}
    )
    prompts = [{"prompt": f"{a} is"} for a in WORDS[:4]]
    return trl.GRPOTrainer(
        model,
        reward_funcs=says_good,
        args=args,
        train_dataset=of(prompts),
        processing_class=tokenizer,
    )


TRAINERS = {"SFT": sft, "DPO": dpo, "KTO": kto, "GRPO": grpo}


@pytest.mark.parametrize(
    "name", ["SFT", "DPO", *(pytest.param(n, marks=pytest.mark.slow) for n in ("KTO", "GRPO"))]
)
def test_the_trainer_trains_all_parameters_at_the_rates_of_adamw(
    name, checkpoint, tokenizer, tmp_path
):
    trainer = TRAINERS[name](load(checkpoint), tokenizer, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    attach(trainer)
    trainer.train()
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    assert isinstance(optimizer, sinkgd.SinkGD)
    initial = {group["algorithm"]: group["initial_lr"] for group in optimizer.param_groups}
    assert initial == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert bool(optimizer.state.get(param)) == (group["algorithm"] == "adamw")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == trainer.args.max_steps
    if name == "SFT":
        assert losses[-1] < 0.8 * losses[0]
    if name == "DPO":
        assert losses[-1] < losses[0] - 0.05


def test_sft_takes_the_factory_in_its_constructor_too(checkpoint, tokenizer, tmp_path):
    args = trl.SFTConfig(str(tmp_path), max_length=32, **COMMON)
    trainer = trl.SFTTrainer(
        load(checkpoint),
        args=args,
        train_dataset=of(TEXTS),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(SinkGDFactory, {"training_args": args}),
    )
    trainer.create_optimizer()
    rates = {group["algorithm"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"sinkgd": pytest.approx(3e-3), "adamw": 1e-2}


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward"])
def test_every_trainer_builds_its_optimizer_as_that_of_transformers(kind):
    """So what test_faults_in_trainers.py shows of the Trainer holds for these."""
    trainer = getattr(trl, f"{kind}Trainer")
    for name in ("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler"):
        assert getattr(trainer, name) is getattr(transformers.Trainer, name)
