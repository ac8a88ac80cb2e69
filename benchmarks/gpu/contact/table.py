"""The table at the end: what the rows say, in at most 60 lines."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

MOST_LINES, WIDTH = 60, 150
BAD = {"wrong", "error", "crashed", "timeout"}
Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    """Return the table; failures come first, because the end of the table may be cut off."""
    parts = [
        [*_bad(rows, 12)],
        [*_environment(rows)],
        [*_counts(rows)],
        [*_steps(rows)],
        [*_training(rows)],
        [*_losses(rows)],
        [*_ladder(rows)],
        [*_sweep(rows)],
        [*_kernels(rows)],
    ]
    lines = [line for part in parts for line in part]
    if len(lines) > MOST_LINES:
        left_out = len(lines) - MOST_LINES + 1
        lines = [*lines[: MOST_LINES - 1], f"… {left_out} lines more; rows.jsonl has all"]
    return "\n".join(line[:WIDTH] for line in lines)


def _of(rows: Rows, section: str, *, ok: bool = True) -> Iterator[dict[str, Any]]:
    for row in rows:
        own = row["section"] == section and row["item"] != "section"
        if own and (not ok or row["status"] == "ok"):
            yield row


def _bad(rows: Rows, most: int) -> Iterator[str]:
    found = [row for row in rows if row["status"] in BAD]
    for row in found[:most]:
        why = row.get("error") or row.get("why") or row.get("outcome") or _figures(row)
        text = " ".join(str(why).split())
        yield f"! {row['section']} / {row['item']}: {row['status']}: {text}"
    if len(found) > most:
        yield f"! {len(found) - most} more"


def _figures(row: dict[str, Any]) -> str:
    skipped = {"section", "item", "status", "tail", "cpu", "device"}
    return ", ".join(f"{name}={value}" for name, value in row.items() if name not in skipped)


def _environment(rows: Rows) -> Iterator[str]:
    for row in _of(rows, "environment"):
        if row["item"] == "machine":
            yield f"{row.get('device', row['processor'])}; torch {row['torch']}"
        elif row["item"] == "launch":
            each = 1e3 * row["ms"] / row["launches"]
            yield f"launch from {row['of']}: {each:.2f} µs"
        elif row["item"] == "backends":
            yield f"auto: {row['auto']}"
    for name in ("copy", "read"):
        rates = [row for row in _of(rows, "environment") if row["item"] == name]
        cells = [f"{row['bytes'] / 1e6:.0f} MB {row['tb_per_second']:.2f}" for row in rates]
        if cells:
            yield f"{name}, TB/s: " + " · ".join(cells)


def _counts(rows: Rows) -> Iterator[str]:
    for section in ("tests", "checks", "hazards", "nano"):
        found: dict[str, int] = {}
        for row in _of(rows, section, ok=False):
            found[row["status"]] = found.get(row["status"], 0) + 1
        if found:
            yield f"{section}: " + ", ".join(f"{count} {name}" for name, count in found.items())


def _steps(rows: Rows) -> Iterator[str]:
    """Yield contenders' times as multiples of AdamW's for each workload, also in a graph."""
    by_workload: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _of(rows, "steps"):
        name = f"{row['workload']} {row['dtype']}"
        by_workload.setdefault(name, {}).setdefault(row["contender"], {}).update(row)
    if by_workload:
        yield "step, × AdamW fused (in a graph; launches):"
    for name, contenders in by_workload.items():
        base = contenders.get("adamw", {})
        ms = base.get("ms")
        cells = [f"adamw {ms:.3f} ms" if ms else "adamw not timed"]
        for contender, row in contenders.items():
            if contender == "adamw":
                continue
            cell = f"{contender} {row['ms'] / ms:.2f}" if ms else f"{contender} {row['ms']:.3f} ms"
            if "graph_ms" in row and "graph_ms" in base:
                cell += f" ({row['graph_ms'] / base['graph_ms']:.2f})"
            cells.append(cell + f"; {row['launches']}" if "launches" in row else cell)
        yield from _wrapped(name, cells)


def _kernels(rows: Rows) -> Iterator[str]:
    found = [row for row in _of(rows, "kernels") if row.get("contender") in {"sinkgd", "deflated"}]
    for row in found[:6]:
        rate = row["pass_bytes"] / row["ms"] / 1e9 if row["ms"] else 0.0
        yield (
            f"kernel {row['workload']} {row['contender']}: {row['kernel'][:40]} ×{row['calls']} "
            f"{row['ms']:.3f} ms, {rate:.2f} TB/s were it one pass"
        )
    for row in [row for row in _of(rows, "kernels") if "ns" in row][:6]:
        yield f"{row['item']}: {_figures(row)}"


def _sweep(rows: Rows) -> Iterator[str]:
    items: dict[str, list[dict[str, Any]]] = {}
    for row in _of(rows, "sweep"):
        items.setdefault(row["item"], []).append(row)
    for name, found in items.items():
        best = min(found, key=lambda row: row["ms"])
        what = {key: best[key] for key in ("room", "area", "threads") if key in best}
        worst = max(row["ms"] for row in found)
        yield f"sweep {name}: best {best['ms']:.3f} ms at {what}; slowest {worst:.3f}; " + (
            f"first {found[0]['ms']:.3f}"
        )


def _training(rows: Rows) -> Iterator[str]:
    presets: dict[str, list[str]] = {}
    for row in _of(rows, "training"):
        presets.setdefault(row["preset"], []).append(
            f"{row['trainer']} {row['tokens_per_second']:,} "
            f"({100 * row['optimizer_share']:.1f} %, {row['peak_bytes'] / 2**30:.2f} GiB)"
        )
    if presets:
        yield "training, tokens/s (optimizer's share, peak memory):"
    for preset, cells in presets.items():
        yield from _wrapped(preset, cells)


def _wrapped(name: str, cells: Sequence[str]) -> Iterator[str]:
    text = f"  {name}: " + " · ".join(cells)
    yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _losses(rows: Rows) -> Iterator[str]:
    for row in _of(rows, "nano"):
        yield f"nano {row['item']}: worst difference from the CPU {row['worst_difference']:.2e}"


def _ladder(rows: Rows) -> Iterator[str]:
    """Yield the final losses of each size, and the tokens to AdamW's loss as a share of AdamW's."""
    sizes: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _of(rows, "ladder"):
        sizes.setdefault(row["preset"], {}).setdefault(row["arm"], []).append(row)
    if sizes:
        yield "ladder, loss (tokens to AdamW's loss, as a share of AdamW's):"
    for preset, arms in sizes.items():
        last = arms["adamw"][-1] if "adamw" in arms else None
        row = next(iter(arms.values()))[-1]
        tokens = f"{row['tokens']:,} tokens, {row['tokens'] / row['hidden_weights']:.1f} a weight"
        if row["step"] < row["of"]:
            tokens += f", stopped at step {row['step']} of {row['of']}"
        cells = []
        for arm, curve in arms.items():
            cell = f"{arm} {curve[-1]['val_loss']:.4f}"
            reached = last and arm != "adamw" and tokens_to_reach(curve, last["val_loss"])
            cells.append(f"{cell} ({reached / last['tokens']:.0%})" if last and reached else cell)
        yield from _wrapped(f"{preset} ({tokens})", cells)


def tokens_to_reach(curve: Rows, loss: float) -> float | None:
    """Return the tokens after which a run first had a loss, interpolated; None if it never had."""
    before: dict[str, Any] | None = None
    for row in curve:
        if row["val_loss"] <= loss:
            if before is None or not math.isfinite(before["val_loss"]):
                return float(row["tokens"])
            way = (before["val_loss"] - loss) / (before["val_loss"] - row["val_loss"])
            return float(before["tokens"] + way * (row["tokens"] - before["tokens"]))
        before = row
    return None
