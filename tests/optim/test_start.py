"""Half steps begin and end where they are told to; the form for tables is a set of options."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from one_matrix import heavy, optimizer_of, update_along
from reference import column_projection, row_projection


def table(weight, **options):
    return sinkgd.SinkGD([{"params": [weight], "algorithm": "sinkgd-table", **options}], lr=1.0)


def test_its_steps_are_those_of_the_form():
    weight = nn.Parameter(torch.zeros(9, 14))
    optimizer, B = table(weight, tiny_row_threshold=0.3), torch.zeros(9, 14).double()
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


def test_defaults_of_the_optimizer_do_not_change_the_form_and_a_group_does():
    form, plain = nn.Parameter(torch.zeros(9, 14)), nn.Parameter(torch.zeros(9, 14))
    groups = [{"params": [form], "algorithm": "sinkgd-table", "first": None}, {"params": [plain]}]
    group, other = sinkgd.SinkGD(groups, momentum=0.5).param_groups
    assert (group["momentum"], group["first"], group["last"]) == (0.95, None, "row")
    assert other["momentum"] == 0.5


def test_param_groups_route_embedding_and_head_to_it():
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    groups = sinkgd.param_groups(
        model, overrides={"table|out.weight": {"algorithm": "sinkgd-table", "lr": 0.0036}}
    )
    optimizer = sinkgd.SinkGD(groups)
    table = optimizer.param_groups[0]
    assert table["param_names"] == ["table.weight", "out.weight"]
    assert table["nesterov"]


@pytest.mark.parametrize(("last", "dim"), [("row", 1), ("column", 0)])
def test_what_comes_last_has_its_length_exactly(last, dim):
    weight = nn.Parameter(torch.zeros(9, 14))
    update = update_along(heavy(), optimizer_of(weight, last=last), weight)
    length = (14 if dim else 9) ** 0.5
    assert_close(update.norm(dim=dim), torch.full(((9 if dim else 14),), length))


def test_of_the_transpose_it_is_the_transpose():
    tall, wide = nn.Parameter(torch.zeros(14, 9)), nn.Parameter(torch.zeros(9, 14))
    expected = update_along(heavy(), optimizer_of(wide, last="row"), wide)
    assert_close(update_along(heavy().T, optimizer_of(tall), tall).T, expected)


@pytest.mark.parametrize("reach", [4, 14])
def test_a_half_step_more_knows_rows_of_all_sizes_and_none(every_backend, reach):
    grad = heavy() * torch.logspace(-reach, reach, 9)[:, None]
    grad[4] = 0
    weight = nn.Parameter(torch.zeros(9, 14))
    options = {"first": "row", "last": "row", "sinkhorn_iterations": 1}
    update = update_along(grad, optimizer_of(weight, **options), weight).double()
    expected = row_projection(column_projection(row_projection(grad)))
    if reach == 4:  # all rows have more than one part in 2**40 of the whole matrix
        assert_close(update, expected, rtol=1e-5, atol=1e-6)
    assert_close(update.norm(dim=1), expected.norm(dim=1), rtol=1e-5, atol=0)
