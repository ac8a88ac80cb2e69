"""Ranks wait for each other as long as all of them live."""

import time
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from sinkgd.lab.train.world import World, join_world
from spawn import on_ranks

TIMEOUT_SECONDS = 2  # of groups that do not set their own; torch's default is 30 minutes


def prepare_slowly(world: World) -> str:
    """Prepare a text on the first rank, longer than torch would let the others wait for it."""

    def prepare() -> str:
        if world.is_first:
            time.sleep(2 * TIMEOUT_SECONDS)
        return f"opened by rank {world.rank}"

    return world.first_before_others(prepare)


def wait_for_a_slow_rank() -> list[str]:
    distributed_c10d.default_pg_timeout = timedelta(seconds=TIMEOUT_SECONDS)
    with join_world(torch.device("cpu")) as world:
        return [prepare_slowly(ranks) for ranks in (world, world.with_own_group())]


def test_ranks_wait_for_one_that_takes_longer_than_torchs_timeout():
    assert on_ranks(2, wait_for_a_slow_rank) == [[f"opened by rank {i}"] * 2 for i in range(2)]
