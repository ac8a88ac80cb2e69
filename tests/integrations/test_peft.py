"""Adapters of PEFT train at the rate that AdamW would get, by AdamW; the rest stays frozen."""

import pytest
import torch

import sinkgd
from sinkgd.integrations.transformers import attach

transformers = pytest.importorskip("transformers", reason="pip install sinkgd[transformers]")
peft = pytest.importorskip("peft", reason="pip install sinkgd[trainers]")

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and of what it imports

LINEARS = ["q_proj", "v_proj", "up_proj"]
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, lora_alpha=8),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "modules_to_save": lambda: peft.LoraConfig(
        r=4, target_modules=LINEARS, modules_to_save=["lm_head"]
    ),
    "IA3": lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["up_proj"]),
    "experts": lambda: peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def mixture():
    """Return a model whose experts are parameters of three dimensions."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def adapted(name):
    return peft.get_peft_model(mixture() if name == "experts" else llama(), CONFIGS[name]())


class Rows(torch.utils.data.Dataset):
    """Counting sequences."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        row = (torch.arange(16) + i) % 64
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize(
    "name",
    [n if n == "LoRA" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS],
)
def test_adapters_go_to_adamw_at_its_rate_and_the_trainer_trains_them(name, tmp_path):
    model = adapted(name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        str(tmp_path),
        learning_rate=1e-2,
        max_steps=10,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model, args, train_dataset=Rows())
    attach(trainer)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, sinkgd.SinkGD)
    groups = optimizer.param_groups
    assert {group["algorithm"] for group in groups} == {"adamw"}
    assert {group["initial_lr"] for group in groups} == {1e-2}
    assert {n for group in groups for n in group["param_names"]} == trained
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == trained
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_the_rate_is_neither_that_of_pretraining_nor_a_matrix_rate():
    model = adapted("LoRA")
    (rate,) = {group["lr"] for group in sinkgd.param_groups(model, adamw_lr=2e-4)}
    assert rate == 2e-4


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "modules_to_save", "experts"])
def test_an_override_gives_the_factors_to_sinkgd_and_nothing_else(name):
    model = adapted(name)
    factors = {"algorithm": "sinkgd", "deflated_rank": 0}
    groups = sinkgd.param_groups(model, adamw_lr=1e-3, overrides={r"\.lora_[AB]\.": factors})
    optimizer = sinkgd.SinkGD(groups)
    model(
        input_ids=torch.arange(16).view(1, -1), labels=torch.arange(16).view(1, -1)
    ).loss.backward()
    optimizer.step()
    for group in optimizer.param_groups:
        is_factors = group["algorithm"] == "sinkgd"
        assert group["lr"] == (0.3e-3 if is_factors else 1e-3)
        for param_name, param in zip(group["param_names"], group["params"], strict=True):
            assert (".lora_A." in param_name or ".lora_B." in param_name) == is_factors
            assert bool(optimizer.state[param]) != is_factors  # factors have no state
