"""A step on fake tensors: the line through two depths is the whole; replaced parts are alike."""

from dataclasses import replace

import pytest
import torch

from sinkgd.lab.plan import Work, find_architecture
from sinkgd.lab.plan import rank_model as parts
from sinkgd.lab.plan.rank_model import weights_of
from sinkgd.lab.plan.trace import LOSS, UPDATE, Live, LiveStorages, run_on_fake_tensors, trace

NINE = find_architecture("llama-9m")
GROUPED = replace(NINE, num_kv_heads=2, tied=True)
SETTINGS = [
    {"precision": "float32"},
    {"precision": "bf16", "release": True, "recompute": True, "loss_chunk_tokens": 32},
    {"precision": "bf16-autocast", "micro_batches": 2},
    {"precision": "bf16", "architecture": GROUPED, "tp": 2},
]


def work(**options):
    return Work(**{"architecture": NINE, "batch_size": 2, "sequence_length": 64, **options})


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, options)))
def test_any_depth_is_on_the_line_through_two_to_the_byte(options):
    base = work(**options)
    deep = replace(base, architecture=replace(base.architecture, num_layers=9))
    assert trace(deep) == run_on_fake_tensors(deep, 9)


@pytest.mark.parametrize("architecture", [NINE, GROUPED], ids=["plain", "grouped"])
def test_a_replaced_block_on_one_rank_is_the_labs(monkeypatch, architecture):
    one = work(architecture=architecture)
    expected = run_on_fake_tensors(one, 4)
    monkeypatch.setattr(parts, "_replaces_blocks", lambda *_: True)
    assert run_on_fake_tensors(one, 4) == expected


def test_shared_keys_and_tensor_parallelism_keep_less_for_backward():
    def kept(**options):
        return run_on_fake_tensors(work(**options), 4)[LOSS].activations

    assert kept(architecture=replace(NINE, num_kv_heads=1)) < kept()
    assert kept(tp=4) < kept() / 2


def test_recomputed_blocks_and_released_gradients_are_not_held():
    plain, little = trace(work()), trace(work(recompute=True, release=True))
    assert little[UPDATE].total == 0
    assert plain[UPDATE].gradients == sum(2 * weight.count for weight in weights_of(NINE))
    assert little[LOSS].activations < plain[LOSS].activations / 4


def test_a_storage_counts_from_its_first_tensor_to_its_last():
    known = torch.zeros(100)
    live = LiveStorages([known])
    with live:
        live.enter("one")
        x = known + 1
        view = x.view(10, 10)
        del x
        y = view * 2
        del view, y
        live.enter("two")
    assert live.peaks == {"one": Live(activations=800), "two": Live()}
