"""Ranks: processes of one machine that talk over gloo."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from multiprocessing import get_context
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240  # seconds
# Imported once, by the process that ranks are forked from; each would take seconds over them. The
# first step of a DTensor imports the compiler.
PRELOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "sinkgd",
)


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``function(*arguments)`` on every rank, and return what each returned.

    Args:
        world_size: The number of ranks.
        function: Of a module, as it travels by its name; so do arguments and results.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, queue, function, arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    answers = [_answer(queue, ranks) for _ in ranks]
    for rank in ranks:
        rank.join()
    failures = [failure for _, _, failure in answers if failure]  # the first came first
    assert not failures, "\n".join(failures)
    results = {rank: torch.load(BytesIO(data), weights_only=False) for rank, data, _ in answers}
    return [results[rank] for rank in range(world_size)]


def _answer(queue, ranks):
    """Wait for the next rank to answer, as long as none has died without a word."""
    for _ in range(PATIENCE):
        try:
            return queue.get(timeout=1)
        except Empty:
            codes = [rank.exitcode for rank in ranks]
            assert not any(codes), f"a rank died before it could answer; exit codes {codes}"
    raise AssertionError(f"no rank answered within {PATIENCE} seconds")


def _rank(rank, world_size, port, queue, function, arguments) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=PATIENCE / 2)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
        data = BytesIO()
        torch.save(function(*arguments), data)
        dist.barrier()
        queue.put((rank, data.getvalue(), ""))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - it is the test that fails
        queue.put((rank, b"", f"rank {rank}: {traceback.format_exc()}"))
