"""Follow one optimizer step through the source, and count what a reader has to open.

For a plain, a deflated, a sharded, and a sharded and deflated step of one matrix on CPUs, the
script prints the files and functions of ``sinkgd`` that the step calls, and how often the step
returns to a file that it had left. The script then counts files and lines for each folder. `--show`
prints the calls in their order.

    python benchmarks/house/walk.py
    PYTHONPATH=OTHER_CLONE/src python benchmarks/house/walk.py --show

The second step is followed: the first one compiles, and builds what later steps keep.
"""

import argparse
import inspect
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

import sinkgd

SOURCE = Path(sinkgd.__file__).parent
RANKS = 2
KINDS = ("plain", "deflated", "sharded", "sharded, deflated")


@dataclass(frozen=True)
class Walk:
    """The calls of one step, in order: a file relative to the package, and a function in it."""

    calls: Sequence[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        """The files, in the order in which the step first enters them."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def functions(self) -> int:
        """How many different functions the step calls."""
        return len(set(self.calls))

    @property
    def returns(self) -> int:
        """How often a call enters a file that the step had already visited and left."""
        visits = [file for file, _ in itertools.groupby(file for file, _ in self.calls)]
        return len(visits) - len(set(visits))


def follow(step: Callable[[], object]) -> Walk:
    """Run ``step`` once, and return the calls of functions of ``sinkgd`` in it."""
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        # Comprehensions and lambdas count as part of the function that contains them. A generator
        # is entered again for each value, and counts only where it begins.
        named = not code.co_name.startswith("<")
        begins = frame.f_lasti <= 0 or not code.co_flags & inspect.CO_GENERATOR
        if event == "call" and named and begins and path.is_relative_to(SOURCE):
            calls.append((str(path.relative_to(SOURCE)), code.co_qualname))

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return Walk(calls)


def walk_of(kind: str) -> Walk:
    """Return the walk of a step of one matrix.

    Args:
        kind: One of `KINDS`. A sharded step needs an initialized process group.
    """
    weight = torch.randn(64, 48)
    grad = torch.randn(64, 48)
    if "sharded" in kind:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight, grad = (distribute_tensor(one, mesh, [Shard(0)]) for one in (weight, grad))
    weight = torch.nn.Parameter(weight)
    rank = 15 if "deflated" in kind else 0
    optimizer = sinkgd.SinkGD([weight], lr=1e-3, deflated_rank=rank)
    for _ in range(2):
        weight.grad = grad.clone()
        optimizer.step()
    weight.grad = grad.clone()
    return follow(optimizer.step)


def sharded_walks() -> dict[str, Walk]:
    """Return the walks of the sharded kinds, on the first of `RANKS` processes over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder,), nprocs=RANKS)  # type: ignore[no-untyped-call]
        found = json.loads((Path(folder) / "walks.json").read_text(encoding="utf-8"))
    return {kind: Walk([(file, name) for file, name in calls]) for kind, calls in found.items()}


def _rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        calls = {kind: walk_of(kind).calls for kind in KINDS if "sharded" in kind}
        if rank == 0:
            (Path(folder) / "walks.json").write_text(json.dumps(calls), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sizes() -> dict[str, tuple[int, int]]:
    """Count the Python files and lines of each folder, of the library and of the laboratory."""
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        half = "the laboratory" if place.parts[0] == "lab" else "the library"
        for name in (str(Path("sinkgd", place.parent)), half):
            files[name] += 1
            lines[name] += len(path.read_text(encoding="utf-8").splitlines())
    return {name: (files[name], lines[name]) for name in sorted(files)}


def report(walks: Mapping[str, Walk], *, show: bool) -> Iterator[str]:
    """Yield the lines of the report; ``show`` adds every call."""
    yield f"{'step':<20}{'files':>7}{'functions':>11}{'returns':>9}"
    for kind, walk in walks.items():
        yield f"{kind:<20}{len(walk.files):>7}{walk.functions:>11}{walk.returns:>9}"
    yield f"\n{'folder':<36}{'files':>7}{'lines':>9}"
    for name, (files, lines) in sizes().items():
        yield f"{name:<36}{files:>7}{lines:>9,}"
    for kind, walk in walks.items() if show else ():
        yield f"\n{kind}"
        for file, function in walk.calls:
            yield f"  {file:<44}{function}"


def main() -> None:
    """Print the walks and the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="print every call, in order")
    show = parser.parse_args().show
    walks = {kind: walk_of(kind) for kind in KINDS if "sharded" not in kind} | sharded_walks()
    for line in report(walks, show=show):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
