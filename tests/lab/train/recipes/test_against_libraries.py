"""Recipes step as an optimizer that is put together by hand from the stated values.

Those written here are compared with float64 oracles in `test_written_here`.
"""

import pytest
import pytorch_optimizer
import torch

import sinkgd
from lab.train.recipes.tiny import built, tiny_model, train
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.recipes import chained_optimizer

STEPS = 5


def roles(model):
    """The matrices of blocks, the embedding with the head, and the norms, by their names."""
    parts = {"matrices": [], "tables": [], "vectors": []}
    for name, param in model.named_parameters():
        kind = "vectors" if param.ndim < 2 else "matrices" if ".layers." in name else "tables"
        parts[kind].append(param)
    assert [len(part) for part in parts.values()] == [14, 2, 5]
    return parts


def rest(model):
    return roles(model)["tables"] + roles(model)["vectors"]


def by_torch(kind, **options):
    return lambda model: [kind(model.parameters(), **options)]


def normed(*norms, num_iters=1):
    return lambda model: [
        sinkgd.MNGD(roles(model)["matrices"], lr=1e-3, norms=norms, num_iters=num_iters),
        torch.optim.AdamW(rest(model), lr=0.08, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def swan(model):
    return [
        sinkgd.SWAN(roles(model)["matrices"], lr=2e-3, newton_schulz_steps=5),
        torch.optim.AdamW(rest(model), lr=0.08, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def scale(model):
    parts = roles(model)
    embedding, head = parts["tables"]
    head_group = {"params": [head], "momentum": 0.9}
    turned = {"params": [embedding], "layout": "transposed"}
    groups = [{"params": parts["matrices"]}, turned, head_group]
    return [
        sinkgd.MNGD(groups, lr=1e-3, norms=[sinkgd.RowNorm()], num_iters=1),
        torch.optim.AdamW(parts["vectors"], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
    ]


def adamw(model):
    groups = [{"params": roles(model)["matrices"], "lr": 3e-3}, {"params": rest(model)}]
    return [torch.optim.AdamW(groups, lr=0.08, betas=(0.9, 0.95), weight_decay=0.0)]


def muon(model):
    return [
        torch.optim.Muon(
            roles(model)["matrices"],
            lr=0.01,
            weight_decay=0.0,
            momentum=0.95,
            nesterov=True,
            ns_steps=5,
            adjust_lr_fn="match_rms_adamw",
        ),
        # Fused as ours, for Muon's bfloat16 enlarges the smallest difference.
        torch.optim.AdamW(rest(model), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def projected(kind):
    def build(model):
        rank = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
        groups = [{"params": roles(model)["matrices"], **rank}, {"params": rest(model)}]
        return [kind(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-6)]

    return build


def soap(model):
    parts = roles(model)
    groups = [
        {"params": parts["matrices"], "weight_decay": 0.01},
        {"params": parts["tables"], "weight_decay": 0.01, "max_precondition_dim": 16},
        {"params": parts["vectors"], "weight_decay": 0.0},
    ]
    return [pytorch_optimizer.SOAP(groups, lr=3e-3, betas=(0.95, 0.95), precondition_frequency=10)]


BY_HAND = {
    "sinkgd-paper": normed(sinkgd.RowNorm(), sinkgd.ColumnNorm(), num_iters=5),
    "sinkgd-stateless": by_torch(sinkgd.SinkGD, lr=1e-3, sinkhorn_iterations=5),
    "swan": swan,
    "tempered": by_torch(sinkgd.TemperedSinkGD, lr=3e-4, weight_decay=0.1, tau=0.1, n_iter=5),
    "spam": by_torch(
        sinkgd.SPAM, lr=1e-3, theta=5000.0, reset_interval=500, warmup_steps=150, clip_delay=20
    ),
    "adamw-spam": by_torch(
        sinkgd.AdamWSPAM,
        lr=6e-4,
        weight_decay=0.1,
        max_norm=1.0,
        spike_z=2.0,
        norm_window=100,
        reset_interval=1000,
        warmup_steps=100,
    ),
    "scale": scale,
    "rows-only": normed(sinkgd.RowNorm()),
    "columns-only": normed(sinkgd.ColumnNorm()),
    "frobenius": normed(sinkgd.FrobeniusNorm()),
    "sign": normed(sinkgd.SignNorm()),
    "adam": by_torch(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.999)),
    "adamw": adamw,
    "adamw-one-lr": by_torch(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0),
    "sgd": by_torch(torch.optim.SGD, lr=0.5),
    "sgd-momentum": by_torch(torch.optim.SGD, lr=0.05, momentum=0.9),
    "muon": muon,
    "galore": projected(pytorch_optimizer.GaLore),
    "fira": projected(pytorch_optimizer.Fira),
    "stable-spam": by_torch(
        pytorch_optimizer.StableSPAM, lr=1e-3, gamma1=0.7, gamma2=0.9, theta=0.999, t_max=None
    ),
    "adafactor": by_torch(
        pytorch_optimizer.AdaFactor,
        lr=1e-3,
        betas=(None, 0.999),
        decay_rate=-0.8,
        clip_threshold=1.0,
        relative_step=False,
        scale_parameter=False,
    ),
    "lion": by_torch(pytorch_optimizer.Lion, lr=3e-4, betas=(0.9, 0.99)),
    "soap": soap,
}


class Together:
    """Steps with a list of optimizers, as a loop written by hand would."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("recipe", BY_HAND)
def test_it_steps_as_the_one_put_together_by_hand(recipe):
    ours, theirs = tiny_model(), tiny_model()
    train(ours, built(ours, recipe), STEPS)
    train(theirs, Together(BY_HAND[recipe](theirs)), STEPS)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Fused and plain kernels round differently, and Adam's first steps are signs.
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: n + m)


def test_a_package_that_is_absent_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("sinkgd.lab.train.recipes.recipe_table.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'galore', which needs .* '\.\[experiments\]'"):
        built(tiny_model(), "galore")
    monkeypatch.setattr(chained_optimizer, "PYTORCH_OPTIMIZER", "absent_package")
    with pytest.raises(ConfigError, match=r"cannot be imported .* '\.\[experiments\]'"):
        chained_optimizer.from_pytorch_optimizer("GaLore")


def test_a_torch_without_muon_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs torch 2\.9; this is .* pip install --upgrade"):
        built(tiny_model(), "muon")


def test_recipes_written_here_need_no_package(monkeypatch):
    monkeypatch.setattr("sinkgd.lab.train.recipes.recipe_table.find_spec", lambda name: None)
    for recipe in ("apollo", "apollo-mini", "racs", "muon"):
        built(tiny_model(), recipe)
