"""SCALE gives every layer the norm of its outputs, and the head alone a memory; SRON has none."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from reference import column_projection, row_projection
from sinkgd.lab.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2)


def test_every_layer_is_normalized_by_output_and_the_head_alone_has_momentum():
    model = Llama(CONFIG, seed=0)
    optimizer = sinkgd.SCALE(sinkgd.scale_groups(model, lr=1.0))
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    hidden = model.model.layers[0].mlp.down_proj.weight
    B = torch.zeros_like(head).double()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.data.zero_()
            param.grad = torch.randn(param.shape, generator=generator)
        B = 0.9 * B + 0.1 * head.grad.double()
        optimizer.step()
        for weight, expected in (
            (table, column_projection(table.grad)),
            (hidden, row_projection(hidden.grad)),
            (head, row_projection(B)),
        ):
            assert_close(-weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    of_matrices = [
        param for param in model.parameters() if param.ndim > 1 and optimizer.state[param]
    ]
    assert of_matrices == [head]
    assert set(optimizer.state[head]) == {"momentum_buffer"}


def test_vectors_are_adamws_and_overrides_go_first():
    model = Llama(CONFIG, seed=0)
    groups = sinkgd.scale_groups(model, 2e-3, 0.8, overrides={"embed": "adamw"})
    algorithms = {}
    for group in sinkgd.SCALE(groups).param_groups:
        for name in group["param_names"]:
            algorithms[name] = group["algorithm"], group["lr"], group.get("momentum")
    assert algorithms["model.norm.weight"] == ("adamw", 2e-3, None)
    assert algorithms["model.embed_tokens.weight"] == ("adamw", 2e-3, None)
    assert algorithms["lm_head.weight"] == ("mngd", 2e-3, 0.8)
    assert algorithms["model.layers.1.self_attn.q_proj.weight"] == ("mngd", 2e-3, 0.0)


def test_sron_is_the_row_half_of_an_iteration():
    weight = nn.Parameter(torch.zeros(5, 7))
    weight.grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    sinkgd.SRON([weight], lr=1.0).step()
    assert_close(-weight.detach().double(), row_projection(weight.grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [sinkgd.SRON, sinkgd.SCALE])
def test_options_are_those_of_mngd(build):
    with pytest.raises(TypeError, match=r"^(SRON|SCALE) has no argument 'backend'; it takes"):
        build([nn.Parameter(torch.zeros(2, 2))], backend="eager")
