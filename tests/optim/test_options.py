"""Each option of SinkGD does what its formula says, keeps what it says, and no other harm."""

import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from option_reference import Expected
from reference import column_projection, row_projection

STEPS = 4


def heavy(seed=0, shape=(9, 14)):
    """A gradient with rows and entries of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[-2], 1, generator=generator).exp()
    return torch.randn(shape, generator=generator).pow(3) * rows


def optimizer_of(weight, **options):
    group = {"params": [("w", weight)], "algorithm": "sinkgd", **options}
    return sinkgd.SinkGD([group], lr=group.pop("lr", 1.0))


def update_along(grad, optimizer, weight):
    """Return what a step of lr 1 takes off the weight, which is put back to zero."""
    weight.data.zero_()
    weight.grad = grad.clone()
    optimizer.step()
    return -weight.detach().clone()


OPTIONS = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "after": {"momentum": 0.5, "momentum_place": "after"},
    "after, nesterov": {"momentum": 0.5, "momentum_place": "after", "nesterov": True},
    "last row": {"last": "row"},
    "first column": {"first": "column"},
    "first and last row": {"first": "row", "last": "row"},
    "first row, which it is anyhow": {"first": "row"},
    "masked": {"tiny_rows": "mask", "tiny_row_threshold": 0.5},
    "unit": {"operator_norm": "unit"},
    "muon": {"operator_norm": "muon"},
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
    for bad in (None, torch.nan, torch.inf):
        good.grad, ill.grad = heavy(0), heavy(1)
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


def same(x):
    return x


def direction(x):
    return x / x.norm()


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


class TestMomentum:
    @pytest.mark.parametrize("place", ["before", "after"])
    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
        ids=["bfloat16", "float64"],
    )
    def test_one_wide_number_an_entry_is_kept(self, place, dtype, kept):
        weight = nn.Parameter(torch.zeros(9, 14, dtype=dtype))
        optimizer = optimizer_of(weight, momentum=0.9, momentum_place=place)
        weight.grad = heavy().to(dtype)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert {k: (v.shape, v.dtype) for k, v in optimizer.state[weight].items()} == {
            "momentum_buffer": ((9, 14), kept)
        }

    def test_a_scale_of_the_loss_that_changes_is_divided_out(self):
        def run(scales):
            weight = nn.Parameter(torch.zeros(9, 14))
            optimizer = optimizer_of(weight, momentum=0.9, nesterov=True)
            for seed, scale in enumerate(scales):
                weight.grad = heavy(seed) * scale
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.step()
            return weight.detach()

        assert torch.equal(run([1.0, 1.0, 1.0]), run([2.0**10, 2.0**5, 2.0**11]))

    def test_vectors_take_part_where_all_parameters_are_stateless(self):
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
    def test_mngd_and_swan_know_it_too(self, place, nesterov):
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

    def test_many_directions_are_made_a_few_at_a_time(self, monkeypatch):
        def run():
            weights = [nn.Parameter(torch.zeros(9, 14)) for _ in range(5)]
            optimizer = sinkgd.SinkGD(weights, momentum=0.9, nesterov=True)
            for step in range(2):
                for i, weight in enumerate(weights):
                    weight.grad = heavy(step + 10 * i)
                optimizer.step()
            return weights

        together = run()
        monkeypatch.setattr("sinkgd.optim.algorithms.few_at_a_time.SCRATCH_BYTES", 1200)
        assert all(torch.equal(a, b) for a, b in zip(together, run(), strict=True))


class TestTinyRows:
    def test_they_are_left_alone_and_the_others_scaled_without_them(self):
        grad = heavy()
        grad[[2, 5]] *= 1e-6
        weight = nn.Parameter(torch.zeros(9, 14))
        update = update_along(grad, optimizer_of(weight, tiny_rows="mask"), weight)
        assert update[[2, 5]].eq(0).all()
        live = [i for i in range(9) if i not in (2, 5)]
        few = nn.Parameter(torch.zeros(7, 14))
        expected = update_along(grad[live], optimizer_of(few), few)
        assert_close(update[live], expected * (9 / 7) ** 0.5)  # columns have the length √9

    def test_by_default_they_are_as_long_as_all_others(self):
        grad = heavy()
        grad[2] *= 1e-6
        weight = nn.Parameter(torch.zeros(9, 14))
        update = update_along(grad, optimizer_of(weight, sinkhorn_iterations=20), weight)
        assert_close(update[2].square().mean().item(), 1.0, rtol=0.1, atol=0)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_the_gradient_and_the_average_stay_as_they_were(self, momentum):
        weight = nn.Parameter(torch.zeros(9, 14))
        options = {"tiny_rows": "mask", "tiny_row_threshold": 0.9, "momentum": momentum}
        optimizer = optimizer_of(weight, **options)
        weight.grad = heavy()
        optimizer.step()
        assert torch.equal(weight.grad, heavy())
        if momentum:
            assert_close(optimizer.state[weight]["momentum_buffer"], heavy() * 0.1)


class TestOperatorNorm:
    @pytest.mark.parametrize("last", ["row", "column"])
    @pytest.mark.parametrize("shape", [(9, 14), (14, 9), (1, 6), (6, 1), (40, 40)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_after_twenty_steps_it_is_within_a_percent(self, shape, dtype, last):
        grad = heavy(3, shape)
        for norm, size in (("unit", 1.0), ("muon", (shape[0] / shape[1]) ** 0.5)):
            weight = nn.Parameter(torch.zeros(shape))
            weight.grad_dtype = None
            optimizer = optimizer_of(weight, operator_norm=norm, last=last)
            for _ in range(20):
                update = update_along(grad.to(dtype), optimizer, weight)
                largest = torch.linalg.svdvals(update.double())[0].item()
                assert size * (1 - 1e-5) < largest < 3 * size  # the estimate is never above
            assert_close(largest, size, rtol=1e-2, atol=0)

    def test_it_is_the_same_direction(self):
        plain, pinned = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9, 14))
        expected = update_along(heavy(), optimizer_of(plain), plain)
        update = update_along(heavy(), optimizer_of(pinned, operator_norm="unit"), pinned)
        assert_close(direction(update), direction(expected))

    @pytest.mark.parametrize("options", [{}, {"split": 3}, {"layout": "transposed"}], ids=str)
    def test_one_vector_a_matrix_is_kept(self, options):
        weight = nn.Parameter(torch.zeros(9, 14, dtype=torch.bfloat16))
        optimizer = optimizer_of(weight, operator_norm="unit", **options)
        for seed in range(2):
            weight.grad = heavy(seed).bfloat16()
            optimizer.step()
        (vector,) = optimizer.state[weight].values()
        assert vector.dtype == torch.float32
        assert vector.shape == ((9, 1) if options.get("layout") else (options.get("split", 1), 14))

    def test_no_direction_is_lost_where_columns_come_and_go(self):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer = optimizer_of(weight, operator_norm="unit")
        left, right = heavy(), heavy()
        left[:, 7:] = 0
        right[:, :7] = 0
        for _ in range(100):
            update_along(left, optimizer, weight)
        for _ in range(30):
            update = update_along(right, optimizer, weight)
            largest = torch.linalg.svdvals(update.double())[0].item()
            assert 1 - 1e-5 < largest < 3
        assert_close(largest, 1.0, rtol=1e-2, atol=0)

    def test_inputs_of_mean_zero_are_no_trap(self):
        weight = nn.Parameter(torch.zeros(9, 14))
        grad = heavy()
        grad -= grad.mean(dim=1, keepdim=True)
        optimizer = optimizer_of(weight, operator_norm="unit")
        for _ in range(20):
            update = update_along(grad, optimizer, weight)
        assert_close(torch.linalg.svdvals(update.double())[0].item(), 1.0, rtol=1e-2, atol=0)


class TestTable:
    def table(self, weight, **options):
        return sinkgd.SinkGD([{"params": [weight], "algorithm": "sinkgd-table", **options}], lr=1.0)

    def test_its_steps_are_those_of_the_form(self):
        weight = nn.Parameter(torch.zeros(9, 14))
        optimizer, B = self.table(weight, tiny_row_threshold=0.3), torch.zeros(9, 14).double()
        for seed in range(3):
            G = heavy(seed).double()
            B = 0.95 * B + 0.05 * G
            D = 0.95 * B + 0.05 * G
            lengths = D.norm(dim=1)
            x = D * (lengths >= 0.3 * lengths.mean())[:, None]
            for half in range(11):  # an odd number, of unit length, from rows to rows
                lengths = x.norm(dim=1 if half % 2 == 0 else 0, keepdim=True)
                x = torch.where(lengths > 0, x / lengths, 0)
            update = update_along(heavy(seed), optimizer, weight).double()
            assert_close(update, x * 14**0.5, rtol=1e-5, atol=1e-6)

    def test_defaults_of_the_optimizer_do_not_change_the_form_and_a_group_does(self):
        weight = nn.Parameter(torch.zeros(9, 14))
        group = sinkgd.SinkGD(
            [{"params": [weight], "algorithm": "sinkgd-table", "first": None}], momentum=0.5
        ).param_groups[0]
        assert (group["momentum"], group["first"], group["last"]) == (0.95, None, "row")

    def test_param_groups_route_embedding_and_head_to_it(self):
        model = nn.ModuleDict({"table": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
        groups = sinkgd.param_groups(
            model, overrides={"table|out.weight": {"algorithm": "sinkgd-table", "lr": 0.0036}}
        )
        optimizer = sinkgd.SinkGD(groups)
        table = optimizer.param_groups[0]
        assert table["param_names"] == ["table.weight", "out.weight"]
        assert table["nesterov"]


class TestBeginAndEnd:
    @pytest.mark.parametrize(("last", "dim"), [("row", 1), ("column", 0)])
    def test_what_comes_last_has_its_length_exactly(self, last, dim):
        weight = nn.Parameter(torch.zeros(9, 14))
        update = update_along(heavy(), optimizer_of(weight, last=last), weight)
        length = (14 if dim else 9) ** 0.5
        assert_close(update.norm(dim=dim), torch.full(((9 if dim else 14),), length))

    def test_of_the_transpose_it_is_the_transpose(self):
        tall, wide = nn.Parameter(torch.zeros(14, 9)), nn.Parameter(torch.zeros(9, 14))
        expected = update_along(heavy(), optimizer_of(wide, last="row"), wide)
        assert_close(update_along(heavy().T, optimizer_of(tall), tall).T, expected)

    @pytest.mark.parametrize("reach", [4, 14])
    def test_a_half_step_more_knows_rows_of_all_sizes_and_none(self, every_backend, reach):
        grad = heavy() * torch.logspace(-reach, reach, 9)[:, None]
        grad[4] = 0
        weight = nn.Parameter(torch.zeros(9, 14))
        options = {"first": "row", "last": "row", "sinkhorn_iterations": 1}
        update = update_along(grad, optimizer_of(weight, **options), weight).double()
        expected = row_projection(column_projection(row_projection(grad)))
        if reach == 4:  # all rows have more than one part in 2**40 of the whole matrix
            assert_close(update, expected, rtol=1e-5, atol=1e-6)
        assert_close(update.norm(dim=1), expected.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
        ({"nesterov": True}, r"nesterov=True needs a momentum above 0"),
        ({"momentum": 0.5, "momentum_place": "middle"}, "momentum_place must be one of .*'middle'"),
        ({"last": "rows"}, "last must be one of .*, got 'rows'"),
        ({"first": "rows"}, "first must be None or one of .*, got 'rows'"),
        ({"tiny_rows": "drop"}, "tiny_rows must be one of .*, got 'drop'"),
        ({"tiny_row_threshold": -1.0}, "tiny_row_threshold must be at least 0, got -1.0"),
        ({"operator_norm": "spectral"}, "operator_norm must be one of .*, got 'spectral'"),
        ({"first": "column", "warm_start": True}, "warm_start=True begins .*leave one of them off"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sinkgd.SinkGD([nn.Parameter(torch.ones(2, 2))], **options)
