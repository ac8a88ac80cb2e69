"""The table of steps: contenders on the matrices of LLaMAs, one contender in memory at a time."""

from collections.abc import Iterator

import torch

from contact.contenders import (
    ADAMW,
    ALL,
    B1,
    B7,
    DEFLATED,
    HALVES,
    LAYER,
    M60,
    M130,
    M350,
    MUON,
    PEER,
    PLAIN,
    PLAIN_1,
    SGD,
    TINY,
    USUAL,
    Contender,
    Step,
    Workload,
    matrices,
    shapes,
)
from contact.items import Item, Row, Rows, Section, Setting, Skipped
from contact.measure import (
    capture,
    held_bytes,
    peak_bytes,
    profile_kernels,
    time_host,
    time_work,
)

BF16, F32 = torch.bfloat16, torch.float32
FEW = (ADAMW, PLAIN, HALVES, DEFLATED, PLAIN_1, PEER, MUON)
# The most important measurements come first, as time may run out.
PLAN: tuple[tuple[Workload, torch.dtype, tuple[Contender, ...]], ...] = (
    (LAYER, BF16, ALL),
    (B1, BF16, USUAL),
    (M60, BF16, ALL),
    (B7, BF16, (ADAMW, PLAIN, HALVES, DEFLATED, SGD, MUON)),
    (LAYER, F32, USUAL),
    (M350, BF16, USUAL),
    (B1, F32, FEW),
    (M60, F32, FEW),
    (M130, BF16, FEW),
    (M350, F32, FEW),
    (M130, F32, FEW),
)
MOST_FAILURES = 2  # after which a contender is left out
GRAPH_BYTES = 8 << 30  # of gradients, at most; larger steps hide their launches anyway


def section(*, tiny: bool) -> Section:
    """Return the section."""
    plan = ((TINY, BF16, ALL), (TINY, F32, USUAL)) if tiny else PLAN
    items = [
        Item(
            f"{workload.name} {_short(dtype)}: {contender.name}",
            _Measure(workload, dtype, contender),
            40,
        )
        for workload, dtype, contenders in plan
        for contender in contenders
    ]
    return Section("steps", 160, tuple(items))


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", F32: "f32"}[dtype]


def failures(setting: Setting, contender: Contender) -> int:
    """Return how many items of this contender failed; each cost the start of a process."""
    return sum(
        row["section"] == "steps"
        and row["status"] in {"error", "crashed", "timeout"}
        and str(row["item"]).endswith(f": {contender.name}")
        for row in Rows(setting.out / "rows.jsonl").read()
    )


class _Measure:
    """Measures one contender on one workload."""

    def __init__(self, workload: Workload, dtype: torch.dtype, contender: Contender) -> None:
        self.workload, self.dtype, self.contender = workload, dtype, contender

    def __call__(self, setting: Setting) -> Iterator[Row]:
        device, contender = setting.device, self.contender
        failed = failures(setting, contender)
        if failed >= MOST_FAILURES:
            raise Skipped(f"failed {failed} times before")
        held_before = held_bytes(device)
        params = matrices(self.workload, self.dtype, device)
        entries = sum(param.numel() for param in params)
        step = contender.build(params, setting)
        seconds, most = (0.02, 3) if setting.tiny else (0.25, 30)
        step()
        timing = time_work(step, device, seconds=seconds, most=most, warm=2)
        what = {
            "workload": self.workload.name,
            "dtype": _short(self.dtype),
            "contender": contender.name,
        }
        yield {
            **what,
            "part": "time",
            "matrices": len(shapes(self.workload)),
            "entries": entries,
            "passes": contender.passes,
            **timing.row(),
            "peak_bytes": peak_bytes(device) - held_before,
        }
        yield {**what, "part": "host and launches", **self._host(setting, step)}
        if not setting.on_gpu:
            yield {**what, "part": "graph", "status": "skipped", "why": "needs a GPU"}
        elif failed:
            yield {**what, "part": "graph", "status": "skipped", "why": "failed before"}
        elif contender.captures and entries * self.dtype.itemsize <= GRAPH_BYTES:
            graph = capture(step, device)
            yield {**what, "part": "graph", **time_work(graph.replay, device).row("graph_")}

    def _host(self, setting: Setting, step: Step) -> dict[str, object]:
        row: dict[str, object] = {**time_host(step, setting.device, repeats=3).row("host_")}
        launches = profile_kernels(step, setting.device)
        row["launches"] = sum(launch.calls for launch in launches)
        row["kernels"] = [[launch.name[:48], launch.calls] for launch in launches[:3]]
        return row
