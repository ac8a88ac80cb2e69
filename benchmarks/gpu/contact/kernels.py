"""Each kernel of a step: its time, its bytes per second, and what ``ncu`` measures of it."""

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.cuda.profiler

from contact.contenders import B1, CONTENDERS, LAYER, TINY, Workload, matrices
from contact.items import Item, Row, Section, Setting, Skipped, need_gpu
from contact.measure import profile_kernels, synchronize

PROFILED = ("sinkgd", "sinkgd halves", "deflated", "adamw", "peer triton")
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "launch__registers_per_thread": "registers",
}


def section(*, tiny: bool) -> Section:
    """Return the section."""
    workloads = (TINY,) if tiny else (B1, LAYER)
    items = [
        Item(f"{workload.name} {name}: {contender}", _Profile(workload, dtype, contender))
        for workload in workloads
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
        for contender in PROFILED
        if not (workload is B1 and dtype == torch.float32)
    ]
    ncu = [Item(f"ncu: {name}", _Ncu(name), 45) for name in ("sinkgd", "sinkgd halves", "deflated")]
    return Section("kernels", 40, (*items, *ncu))


class _Profile:
    """Profiles one step, and compares each kernel's time with that of a pass over the matrices."""

    def __init__(self, workload: Workload, dtype: torch.dtype, contender: str) -> None:
        self.workload, self.dtype, self.contender = workload, dtype, contender

    def __call__(self, setting: Setting) -> Iterator[Row]:
        params = matrices(self.workload, self.dtype, setting.device)
        step = CONTENDERS[self.contender].build(params, setting)
        for _ in range(2):
            step()
        one_pass = sum(param.nbytes for param in params)
        for launch in profile_kernels(step, setting.device)[:6]:
            yield {
                "workload": self.workload.name,
                "dtype": str(self.dtype),
                "contender": self.contender,
                "kernel": launch.name[:80],
                "calls": launch.calls,
                "ms": round(launch.ms, 4),
                "pass_bytes": one_pass,
                "passes_at_2.5_tb": round(launch.ms * 2.5e9 / one_pass, 2),
            }


class _Ncu:
    """Runs one step of a llama-1b layer under ``ncu``; yields a row for each slow kernel."""

    def __init__(self, contender: str) -> None:
        self.contender = contender

    def __call__(self, setting: Setting) -> Iterator[Row]:
        need_gpu(setting)
        ncu = shutil.which("ncu")
        if ncu is None:
            raise Skipped("ncu is not on the PATH")
        command = ncu_command(ncu, self.contender)
        limit = max(5.0, min(40.0, setting.left()))
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        rows = read_ncu(answer.stdout)
        if not rows:
            said = (answer.stdout + answer.stderr)[-500:]
            raise RuntimeError(f"ncu measured nothing, exit code {answer.returncode}: {said}")
        yield from slowest(rows, 3)


def ncu_command(ncu: str, contender: str) -> list[str]:
    """Return the command that measures the kernels of one step with normal clocks and caches.

    By default ``ncu`` empties the L2 cache before each kernel, so that no kernel would find its
    bucket there.
    """
    script = Path(__file__).parent.parent / "first_contact.py"
    return [
        *(ncu, "--clock-control", "none", "--cache-control", "none"),
        *("--profile-from-start", "off", "--csv"),
        *("--print-units", "base", "--launch-count", "60", "--metrics", ",".join(METRICS)),
        *(sys.executable, str(script), "--under-ncu", contender),
    ]


def step_under_ncu(contender: str) -> None:
    """Take one step between the marks that ``ncu --profile-from-start off`` waits for."""
    device = torch.device("cuda")
    setting = Setting(device, tiny=False, out=Path(), tokens=None, deadline=0.0)
    step = CONTENDERS[contender].build(matrices(LAYER, torch.bfloat16, device), setting)
    for _ in range(2):
        step()
    synchronize(device)
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    step()
    synchronize(device)
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def read_ncu(text: str) -> list[dict[str, object]]:
    """Return a row for each kernel launch from the CSV that ``ncu`` prints between its remarks."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, object]] = {}
    for cells in csv.DictReader(io.StringIO("\n".join(lines))):
        row = found.setdefault(cells["ID"], {"kernel": cells["Kernel Name"][:80]})
        name = METRICS.get(cells.get("Metric Name", ""))
        if name is not None:
            row[name] = _number(cells["Metric Value"])
    return list(found.values())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # "n/a" if the counter is not available


def slowest(rows: list[dict[str, object]], count: int) -> list[dict[str, object]]:
    """Return the longest launch of each of the kernels that took the most time."""

    def taken(row: dict[str, object]) -> float:
        return float(str(row.get("ns") or 0))

    total: dict[object, float] = {}
    longest: dict[object, dict[str, object]] = {}
    for row in rows:
        total[row["kernel"]] = total.get(row["kernel"], 0.0) + taken(row)
        if row["kernel"] not in longest or taken(row) > taken(longest[row["kernel"]]):
            longest[row["kernel"]] = row
    names = sorted(total, key=lambda name: -total[name])[:count]
    return [{**longest[name], "ns_of_all": total[name]} for name in names]
