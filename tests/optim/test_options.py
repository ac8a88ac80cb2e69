"""Each option of SinkGD does what its formula says, keeps what it says, and no other harm."""

import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from one_matrix import direction, heavy, optimizer_of, same, update_along
from option_reference import Expected

STEPS = 4


OPTIONS = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "after": {"momentum": 0.5, "momentum_place": "after"},
    "after, nesterov": {"momentum": 0.5, "momentum_place": "after", "nesterov": True},
    "8 bits": {"momentum": 0.5, "momentum_place": "after", "momentum_bits": 8},
    "low rank": {"momentum_rank": 2},
    "low rank, all of it": {"momentum_rank": 9, "low_rank_momentum": 0.5},
    "averaged scales": {"averaged_scales": 0.75},
    "averaged scales, deflated": {"averaged_scales": 0.75, "deflated_rank": 2},
    "averaged scales, last row": {"averaged_scales": 0.75, "last": "row"},
    "last row": {"last": "row"},
    "first column": {"first": "column"},
    "first and last row": {"first": "row", "last": "row"},
    "first row, which it is anyhow": {"first": "row"},
    "masked": {"tiny_rows": "mask", "tiny_row_threshold": 0.5},
    "deflated": {"deflated_rank": 2},
    "deflated, kept": {"deflated_rank": 2, "deflated_start": "kept"},
    "unit": {"operator_norm": "unit"},
    "muon": {"operator_norm": "muon"},
    "projected": {"weight_projection": True},
    "held": {"constant_norm": True},
}
every = pytest.mark.parametrize("name", OPTIONS)


@every
@pytest.mark.parametrize(("shape", "iterations"), [((9, 14), 3), ((14, 9), 1)], ids=str)
def test_steps_are_those_of_the_formula(every_backend, name, shape, iterations):
    options = {"sinkhorn_iterations": iterations, **OPTIONS[name]}
    weight = nn.Parameter(torch.zeros(shape))
    optimizer, expected = optimizer_of(weight, **options), Expected(torch.zeros(shape), **options)
    for seed in range(STEPS):
        grad = heavy(seed, shape)
        update = update_along(grad, optimizer, weight).double()
        expected.weight = torch.zeros(shape)  # as `update_along` does
        assert_close(update, expected.step(grad), rtol=2e-5, atol=2e-6)


@every
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_the_gradient_does_not_matter(every_backend, name, size):
    updates = []
    for factor in (1.0, size):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, **OPTIONS[name])
        updates.append(
            [
                update_along(heavy(seed).clamp(-30, 30) * factor, optimizer, weight)
                for seed in (0, 1)
            ]
        )
    for plain, scaled in zip(*updates, strict=True):
        assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


@every
def test_a_zero_gradient_moves_nothing(name):
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(weight, **OPTIONS[name])
    assert update_along(torch.zeros(9, 14), optimizer, weight).eq(0).all()
    assert update_along(heavy(), optimizer, weight).isfinite().all()


@every
def test_a_bad_gradient_leaves_weight_and_state_as_they_were(name):
    good, ill = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9, 14))
    group = {"params": [("good", good), ("ill", ill)], "algorithm": "sinkgd", **OPTIONS[name]}
    optimizer = sinkgd.SinkGD([group], nonfinite="skip")
    for seed, bad in enumerate((None, torch.nan, torch.inf)):
        good.grad, ill.grad = heavy(seed), heavy(1)
        before = {key: value.clone() for key, value in optimizer.state[ill].items()}
        weight = ill.detach().clone()
        if bad is not None:
            ill.grad[3, 5] = bad
        moved = good.detach().clone()
        optimizer.step()
        assert not torch.equal(good, moved)
    assert torch.equal(ill, weight)
    assert all(torch.equal(optimizer.state[ill][key], before[key]) for key in before)
    assert optimizer.skipped() == {"ill": 2}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_that_goes_on_takes_the_steps_it_would_have_taken(name, dtype, rounding):
    options = {"rounding": rounding, "seed": 4, "lr": 0.1, **OPTIONS[name]}

    def a_run(first, steps, weight, optimizer):
        for seed in range(first, first + steps):
            weight.grad = heavy(seed).to(dtype)
            optimizer.step()

    whole = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
    a_run(0, 5, whole, optimizer_of(whole, **options))
    part = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
    optimizer = optimizer_of(part, **options)
    a_run(0, 2, part, optimizer)
    file = io.BytesIO()
    torch.save({"weight": part.detach(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()))
    resumed = nn.Parameter(saved["weight"])
    optimizer = optimizer_of(resumed, **options)
    optimizer.load_state_dict(saved["optimizer"])
    a_run(2, 3, resumed, optimizer)
    assert torch.equal(resumed, whole)


@every
@pytest.mark.parametrize(
    "layout", [{"split": 3}, {"layout": "transposed"}, {"layout": "transposed", "split": (2, 12)}]
)
def test_layouts_and_parts_are_matrices_of_their_own(name, layout):
    is_transposed = "layout" in layout
    fused = nn.Parameter(torch.zeros(9, 14))
    optimizer = optimizer_of(fused, **OPTIONS[name], **layout)
    sizes = {1: [14], 3: [3, 3, 3], (2, 12): [2, 12]}[layout.get("split", 1)]
    singles = [nn.Parameter(torch.zeros(size, 9 if is_transposed else 14)) for size in sizes]
    others = [optimizer_of(single, **OPTIONS[name]) for single in singles]
    for seed in range(3):
        grad = heavy(seed)
        update = update_along(grad, optimizer, fused)
        grads, updates = (x.T if is_transposed else x for x in (grad, update))
        matrices = zip(grads.split(sizes), updates.split(sizes), others, singles, strict=True)
        # Their vectors begin with other numbers, and the estimates then differ.
        compared = direction if "operator_norm" in OPTIONS[name] and len(sizes) > 1 else same
        for part, own, other, single in matrices:
            expected = compared(update_along(part, other, single))
            assert_close(compared(own), expected, rtol=1e-4, atol=1e-5)


@every
def test_experts_are_matrices_of_their_own(name):
    experts = nn.Parameter(torch.zeros(3, 9, 14))
    optimizer = optimizer_of(experts, **OPTIONS[name])
    singles = [nn.Parameter(torch.zeros(9, 14)) for _ in range(3)]
    others = [optimizer_of(single, **OPTIONS[name]) for single in singles]
    for seed in range(3):
        grads = torch.stack([heavy(seed + 10 * i) for i in range(3)])
        update = update_along(grads, optimizer, experts)
        for i, (single, other) in enumerate(zip(singles, others, strict=True)):
            expected = update_along(grads[i], other, single)
            compared = direction if "operator_norm" in OPTIONS[name] and i > 0 else same
            assert_close(compared(update[i]), compared(expected), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_out_by_everything_else(name, memory):
    flat = nn.Parameter(torch.zeros(6, 36))
    kernel = nn.Parameter(torch.zeros(6, 4, 3, 3).contiguous(memory_format=memory))
    plain, optimizer = optimizer_of(flat, **OPTIONS[name]), optimizer_of(kernel, **OPTIONS[name])
    for seed in range(3):
        grad = heavy(seed, (6, 36))
        expected = update_along(grad, plain, flat)
        update = update_along(grad.view(6, 4, 3, 3), optimizer, kernel)
        assert_close(update.flatten(1), expected, rtol=1e-4, atol=1e-5)


@every
def test_init_state_makes_what_a_first_step_makes(name):
    stepped, made = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9, 14))
    one, other = optimizer_of(stepped, **OPTIONS[name]), optimizer_of(made, **OPTIONS[name])
    other.init_state()
    update = update_along(heavy(), one, stepped)
    assert torch.equal(update_along(heavy(), other, made), update)
    assert one.state[stepped].keys() == other.state[made].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
        ({"nesterov": True}, r"nesterov=True needs a momentum above 0"),
        ({"momentum": 0.5, "momentum_place": "middle"}, "momentum_place must be one of .*'middle'"),
        ({"momentum_bits": 16}, r"momentum_bits must be one of \(8, 32\), got 16"),
        ({"momentum_bits": 8}, "momentum_bits=8 needs a momentum above 0"),
        ({"momentum": 0.5, "momentum_bits": 8}, "momentum_bits=8 needs an average of updates"),
        ({"last": "rows"}, "last must be one of .*, got 'rows'"),
        ({"first": "rows"}, "first must be None or one of .*, got 'rows'"),
        ({"tiny_rows": "drop"}, "tiny_rows must be one of .*, got 'drop'"),
        ({"tiny_row_threshold": -1.0}, "tiny_row_threshold must be at least 0, got -1.0"),
        ({"momentum_rank": -1}, "momentum_rank must be .* at least 0, got -1"),
        ({"low_rank_momentum": 1.0}, r"low_rank_momentum must lie in \[0, 1\), got 1.0"),
        ({"averaged_scales": 1.0}, r"averaged_scales must lie in \[0, 1\), got 1.0"),
        ({"deflated_start": "last"}, "deflated_start must be one of .*, got 'last'"),
        ({"operator_norm": "spectral"}, "operator_norm must be one of .*, got 'spectral'"),
        (
            {"constant_norm": True, "weight_decay": 0.1},
            "constant_norm=True keeps .*'parameter 0 of group 0', so weight_decay=0.1 could",
        ),
        ({"first": "column", "warm_start": True}, "warm_start=True begins .*leave one of them off"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sinkgd.SinkGDVariant([nn.Parameter(torch.ones(2, 2))], **options)
