"""Momentum before or after the normalization: what is kept, in which type, and who knows it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from one_matrix import heavy, optimizer_of, update_along
from reference import row_projection


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=["bfloat16", "float64"],
)
def test_one_wide_number_an_entry_is_kept(place, dtype, kept):
    weight = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
    optimizer = optimizer_of(weight, momentum=0.9, momentum_place=place)
    weight.grad = heavy().to(dtype)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert {k: (v.shape, v.dtype) for k, v in optimizer.state[weight].items()} == {
        "momentum_buffer": ((9, 14), kept)
    }


def test_a_scale_of_the_loss_that_changes_is_divided_out():
    def run(scales):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, momentum=0.9, nesterov=True)
        for seed, scale in enumerate(scales):
            weight.grad = heavy(seed) * scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run([1.0, 1.0, 1.0]), run([2.0**10, 2.0**5, 2.0**11]))


def test_vectors_take_part_where_all_parameters_are_stateless():
    bias = nn.Parameter(torch.zeros(5))
    optimizer = sinkgd.SinkGD([bias], lr=1.0, momentum=0.5)
    kept = torch.zeros(5).double()
    for seed in range(3):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        kept = 0.5 * kept + 0.5 * grad.double()
        update = update_along(grad, optimizer, bias).double()
        assert_close(update, kept * (5**0.5 / kept.norm()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_mngd_and_swan_know_it_too(place, nesterov):
    options = {"momentum": 0.5, "nesterov": nesterov, "momentum_place": place}
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = sinkgd.MNGD([weight], 1.0, [sinkgd.RowNorm()], 1, **options)
    B = torch.zeros(9, 14).double()
    for seed in range(3):
        x = heavy(seed).double()
        x = x if place == "before" else row_projection(x)
        B = 0.5 * B + 0.5 * x
        along = 0.5 * B + 0.5 * x if nesterov else B
        expected = row_projection(along) if place == "before" else along
        update = update_along(heavy(seed), optimizer, weight).double()
        assert_close(update, expected, rtol=1e-5, atol=1e-6)
    swan = sinkgd.SWAN([weight], 1.0, **options)
    assert update_along(heavy(), swan, weight).ne(0).any()


def test_many_directions_are_made_a_few_at_a_time(monkeypatch):
    def run():
        weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(5)]
        optimizer = sinkgd.SinkGD(weights, momentum=0.9, nesterov=True)
        for step in range(2):
            for i, weight in enumerate(weights):
                weight.grad = heavy(step + 10 * i)
            optimizer.step()
        return weights

    together = run()
    monkeypatch.setattr("sinkgd.optim.transform.SCRATCH_BYTES", 1200)
    assert all(torch.equal(a, b) for a, b in zip(together, run(), strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [0.5, 0.9, 0.99])
def test_averages_in_8_bits_fade_where_there_are_no_updates(mu, nesterov):
    options = {"momentum": mu, "nesterov": nesterov, "momentum_place": "after"}
    weight = nn.Parameter(torch.zeros(4, 9, 14))
    optimizer = optimizer_of(weight, momentum_bits=8, **options)
    for seed in range(30):
        weight.grad = torch.stack([heavy(4 * seed + i) for i in range(4)])
        optimizer.step()
    weight.grad[1] = 0  # an expert without tokens
    weight.grad[2, 3] = 0
    for _ in range(127):
        optimizer.step()
    kept = optimizer.state[weight]["momentum_buffer"]
    assert kept.dtype == torch.int8
    assert not kept[1].any()
    assert not kept[2, 3].any()
    assert kept[0].any()
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight[1], before[1])


@pytest.mark.parametrize("mu", [0.5, 0.9, 0.99])
def test_noisy_averages_in_8_bits_are_not_shortened(mu):
    sizes = []
    for bits in (8, 32):
        weight = nn.Parameter(torch.zeros(64, 64))
        options = {"momentum": mu, "momentum_place": "after", "momentum_bits": bits}
        optimizer = optimizer_of(weight, **options)
        for seed in range(200):
            update = update_along(heavy(seed, (64, 64)), optimizer, weight)
        sizes.append(update.norm().item())
    assert sizes[0] > 0.98 * sizes[1]  # rounding makes them longer, by 20 % at 0.99


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gaps_of_a_weight_take_no_memory(bits, transposed):
    weights = torch.zeros(64, 1024)[:, :64]
    weight = nn.Parameter(weights.T if transposed else weights)
    options = {"momentum": 0.5, "momentum_place": "after", "momentum_bits": bits}
    gapped, plain = optimizer_of(weight, **options), nn.Parameter(torch.zeros(64, 64))
    dense = optimizer_of(plain, **options)
    for seed in range(3):
        update = update_along(heavy(seed, (64, 64)), gapped, weight)
        expected = update_along(heavy(seed, (64, 64)), dense, plain)
        assert_close(update, expected)
    kept = gapped.state[weight]["momentum_buffer"]
    assert kept.untyped_storage().nbytes() == bits // 8 * 64 * 64
    assert bits == 8 or kept.is_contiguous() != transposed
