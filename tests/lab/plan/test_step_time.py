"""The estimated time of a step: what an update reads and writes."""

import pytest

from sinkgd.lab.devices import find_device
from sinkgd.lab.plan import Grid, Work, find_architecture, find_method
from sinkgd.lab.plan.step_time import step_time

MATRICES, TABLES, NORMS = 25_296_896, 2 * 32_000 * 512, 17 * 512  # entries of llama-60m


@pytest.mark.parametrize(
    ("name", "of_matrices", "of_tables"),
    [("lion", 5, 5), ("scale", 5, 5), ("spam", 20, 20), ("muon", 5, 7), ("adamw", 7, 7)],
)
def test_embedding_and_head_take_the_passes_of_the_method_that_updates_them(
    name, of_matrices, of_tables
):
    device = find_device("h100")
    work = Work(find_architecture("llama-60m"), precision="bf16")
    found = step_time(
        work, Grid(), find_method(name), device, [], mfu=1e30
    )  # products take no time
    moved = 2 * (of_matrices * MATRICES + of_tables * TABLES + 7 * NORMS)
    assert found.update == pytest.approx(moved / device.memory_rate)
