"""What the compiled loops know of other threads: their number, shared counters, a barrier."""

from typing import Any

from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import int64, types
from numba.extending import intrinsic

from sinkgd.kernels.cpu import tables as t
from sinkgd.kernels.cpu.instructions import compiled, inlined
from sinkgd.kernels.cpu.team import torch_team

PATIENCE = 10_000  # looks at a counter, each about a nanosecond

_I64 = ir.IntType(64)

# Before the loops that call them are linked: a name that is not known then ends the process.
_team = torch_team()
if _team is None:
    raise ImportError("torch's OpenMP runtime has no GOMP_parallel")
for _name, _address in _team.symbols.items():
    add_symbol(_name, _address)

thread_num = types.ExternalFunction("sinkgd_thread_num", types.int32())
num_threads = types.ExternalFunction("sinkgd_num_threads", types.int32())
give_way = types.ExternalFunction("sinkgd_yield", types.int32())


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """Add one to a counter that all threads share, and return what it was.

    What this thread wrote before is seen by whoever reads the counter later.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return int64(int64), generate


@intrinsic
def peek(typing: Any, address: Any) -> Any:
    """Read a counter that all threads share."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return int64(int64), generate


@inlined
def share(count, worker, workers, unit):
    """Where a worker's part of ``count`` begins, in whole units; parts differ by at most one."""
    units = (count + unit - 1) // unit
    return min(count, unit * (units * worker // workers))


@compiled
def barrier(job, team):
    """Wait until every thread of the team is here.

    A thread that has waited for some microseconds gives way to others: where there are more threads
    than cores, the one that all wait for may be among them.
    """
    place = claim(job + t.ARRIVED)
    complete = place - place % team + team
    looks = 0
    while peek(job + t.ARRIVED) < complete:
        looks += 1
        if looks > PATIENCE:
            give_way()
