"""The real Trainer trains real LLaMA and GPT-2 models with the factory."""

import pytest
import torch

import sinkgd
from sinkgd.integrations.transformers import SinkGDFactory

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


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        SinkGDFactory()(llama(), learning_rate=0.1)
