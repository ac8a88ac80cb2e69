"""What a GPU settles about SinkGD, in one command of less than ten minutes.

PYTHONPATH=src python3 benchmarks/gpu/first_contact.py --out FOLDER --budget 560

README.md beside this file says what the sections and their columns mean.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from contact import (
    checks,
    environment,
    hazards,
    kernels,
    ladder,
    losses,
    steps,
    suite,
    sweep,
    training,
)
from contact.items import Rows, Section, Setting, run_items
from contact.table import table
from contact.watch import Watch, run_together, this_script

BUDGET = 560.0  # seconds; the sections' shares are meant for this budget
TABLE_SECONDS = 4.0


def sections(*, tiny: bool) -> tuple[Section, ...]:
    """Return all sections, in the order in which they run."""
    return (
        environment.section(),
        suite.section(),
        sweep.compile_section(tiny=tiny),
        checks.section(tiny=tiny),
        hazards.section(),
        steps.section(tiny=tiny),
        kernels.section(tiny=tiny),
        sweep.section(tiny=tiny),
        training.section(tiny=tiny),
        losses.section(tiny=tiny),
        ladder.section(),
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of rows.jsonl, table.txt and log.txt")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--tokens", type=Path, help="a file that make_tokens.py made, for losses")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run only these sections")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # from here on: for a part of a run
    parser.add_argument("--span", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--under-ncu", help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    if found.out is None and found.under_ncu is None:
        parser.error("--out FOLDER is required")
    if found.device == "auto":
        found.device = "cuda" if torch.cuda.is_available() else "cpu"
    return found


def part(args: argparse.Namespace) -> int:
    """Run some items of one section in this process."""
    (section,) = (one for one in sections(tiny=args.tiny) if one.name == args.section)
    first, beyond = map(int, args.span.split(":"))
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    setting = Setting(device, args.tiny, args.out, args.tokens, args.deadline)

    def say(word: str) -> None:
        sys.stdout.write(word + "\n")
        sys.stdout.flush()

    return run_items(section, first, beyond, setting, say)


def whole(args: argparse.Namespace) -> int:
    """Run every section in processes of its own, each within its share of the budget."""
    begin = time.monotonic()
    end = begin + args.budget - TABLE_SECONDS
    args.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.out / "rows.jsonl")
    again = ["--out", str(args.out), "--device", args.device]
    again += ["--tiny"] if args.tiny else []
    again += ["--tokens", str(args.tokens)] if args.tokens else []
    command = this_script(Path(__file__), again)
    # On a CPU the library may compile its loops first.
    watch = Watch(command, rows, args.out / "log.txt", patience=10.0 if args.tiny else 1.0)
    found = [one for one in sections(tiny=args.tiny) if not args.only or one.name in args.only]
    groups = [[one for one in found if not one.timed], *([one] for one in found if one.timed)]
    for number, group in enumerate(filter(None, groups), start=1):
        left = end - time.monotonic()
        share = sum(section.seconds for section in group) * args.budget / BUDGET
        last = number == sum(map(bool, groups))  # the last one takes what the others left
        run_together(group, left if last else min(left, share), watch)
    found_rows = rows.read()
    code = 0
    try:
        text = table(found_rows)
    except Exception as error:  # noqa: BLE001 - the rows are there, and their place must be said
        text = f"no table: {type(error).__name__}: {error}; all rows are in {rows.path}"
        code = 1
    (args.out / "table.txt").write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return code


def main() -> int:
    """Run the whole, or the part that a parent process asks for."""
    args = arguments()
    if args.under_ncu is not None:
        kernels.step_under_ncu(args.under_ncu)
        return 0
    return part(args) if args.section is not None else whole(args)


if __name__ == "__main__":
    sys.exit(main())
