"""A LLaMA 3 over the ranks of a mesh: a tied head stays tied, and odd divisions are refused.

The ranks are not there: this process is the first of them, and nothing is sent.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sinkgd.lab.models import Llama, LlamaConfig
from sinkgd.lab.train.config import ConfigError, MeshConfig
from sinkgd.lab.train.mesh import form_mesh, shard_model
from sinkgd.lab.train.world import World

RANKS = 4
LLAMA_3 = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    max_sequence_length=16,
    num_key_value_heads=2,
    head_dim=12,
    tied_head=True,
)


@pytest.fixture(autouse=True)
def _first_of_four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def sharded(sizes: LlamaConfig, *, sequence_length: int = 16, **mesh: int) -> Llama:
    with torch.device("meta"):
        model = Llama(sizes)
    ranks = form_mesh(MeshConfig(**mesh), World(0, RANKS), torch.device("cpu"))
    shard_model(model, ranks, sequence_length=sequence_length)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_head_is_one_sharded_weight(tp):
    model = sharded(LLAMA_3, tp=tp)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.to_local().shape == (64 // RANKS, 32)
    assert sum(weight.numel() for weight in model.parameters()) == LLAMA_3.parameter_count


def test_keys_and_values_are_divided_by_heads():
    attention = sharded(LLAMA_3, tp=2).model.layers[0].self_attn
    shapes = {name: weight.shape for name, weight in attention.named_parameters()}
    assert shapes["q_proj.weight"] == (48, 32)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (24, 32)
    assert shapes["o_proj.weight"] == (32, 48)
    assert attention.k_proj.weight.placements[-1] == Shard(0)


def test_ranks_that_do_not_divide_the_key_value_heads_are_refused():
    words = (
        "mesh.tp is 4, which does not divide the 2 key-value heads; set mesh.tp to a divisor of 2"
    )
    with pytest.raises(ConfigError, match=words):
        sharded(LLAMA_3, tp=4)
    assert sharded(replace(LLAMA_3, num_key_value_heads=None), tp=4)


@pytest.mark.parametrize(("longest", "trained"), [(16, 15), (15, 14), (15, 15)])
def test_ranks_must_divide_the_sequences_of_the_training_and_not_the_longest(longest, trained):
    sizes = replace(LLAMA_3, max_sequence_length=longest)
    if trained % 2 == 0:
        assert sharded(sizes, sequence_length=trained, tp=2)
        return
    with pytest.raises(ConfigError, match=r"mesh\.tp is 2, which does not divide the 15 tokens of"):
        sharded(sizes, sequence_length=trained, tp=2)
