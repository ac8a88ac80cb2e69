"""The study `scale`: estimates for models that are too large to train here.

For each model and method it finds the fewest devices, a power of two, on which a step fits. As in
`sinkgd plan`, memory comes from a pass on fake tensors, and time from an assumed fraction of the
peak. There are no runs, so nothing is tuned and nothing is said about the loss.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.disk import parse_json
from sinkgd.lab.experiments.study_record import STUDY_FILE, without_kind
from sinkgd.lab.experiments.study_verdict import Verdict
from sinkgd.lab.plan import (
    Grid,
    Question,
    Work,
    find_architecture,
    find_device,
    find_method,
    make_plan,
    rank_memory,
)
from sinkgd.lab.recorded_names import NAMING, command_now, recipe_now
from sinkgd.lab.report.console import TextTable
from sinkgd.lab.report.cost import gpu_hours
from sinkgd.lab.report.quantities import count, size
from sinkgd.lab.results import ResultsError

NAME = "scale"
QUESTION = "On how few devices can 10, 70 and 405 billion weights be trained with each method?"
BACKGROUND = (
    "Every method trains all weights in bfloat16: one sequence of 4,096 tokens per device, blocks "
    "recomputed in backward, the loss in chunks, gradients released if the method can, FSDP over "
    "all devices. Time is an estimate at 40 % of the peak, without latency. How many tokens a "
    "method needs is a question of table1."
)

MODELS = ("llama-10b", "llama-3-70b", "llama-3-405b")
METHODS = (
    "sinkgd",
    "sinkgd-paper",
    "sinkgd-stateless",
    "sinkgd-pinned",
    "swan",
    "adamw",
    "adamw-8bit",
    "muon",
    "apollo-mini",
    "galore",
)
BASELINE = "adamw"
DEVICE = "h100"
USABLE, MFU = 0.9, 0.4  # the defaults of `sinkgd plan`
RANKS = tuple(2**i for i in range(10))  # numbers of devices to try: 1 to 512
TOKENS = 1e12  # number of tokens for which device-hours are given


@dataclass(frozen=True)
class Fit:
    """A model and method, and the fewest devices on which a training step fits."""

    model: str
    method: str
    title: str
    parameters: int
    ranks: int | None  # number of devices; None if the largest number tried is too small
    peak_bytes: int  # per rank, on these devices or on the largest number tried
    step_seconds: float
    tokens_per_device_second: float

    @property
    def device_hours(self) -> float:
        """Total device-hours for `TOKENS`."""
        return gpu_hours(TOKENS, self.tokens_per_device_second)


def fewest_devices(model: str, method: str, ranks: Sequence[int] = RANKS) -> Fit:
    """Find the fewest devices on which a training step fits.

    Args:
        model: A model name of `sinkgd plan`.
        method: A name in `sinkgd.lab.plan.METHODS`.
        ranks: One or more numbers of devices to try, in increasing order.

    Raises:
        ModelError: If there is no such model.
        ConfigError: If there is no such method, or the model cannot be divided among the devices.
    """
    architecture, known = find_architecture(model), find_method(method)
    work = Work(
        architecture,
        batch_size=1,
        sequence_length=4096,
        precision="bf16",
        release=known.can_release,
        recompute=True,
        loss_chunk_tokens=1024,
    )
    device = find_device(DEVICE)
    limit = USABLE * device.memory_bytes
    enough = [n for n in ranks if rank_memory(work, Grid(dp_shard=n), known).peak <= limit]
    n = enough[0] if enough else ranks[-1]
    question = Question(work, Grid(dp_shard=n), device, known, USABLE, MFU, TOKENS, None)
    answer = make_plan(question, ladder=())
    plan = answer.of(method)
    return Fit(
        model=model,
        method=method,
        title=known.title,
        parameters=answer.parameters,
        ranks=n if plan.fits else None,
        peak_bytes=plan.memory.peak,
        step_seconds=plan.time.step,
        tokens_per_device_second=plan.tokens_per_day / 86_400 / n,
    )


def run_on_paper(
    say: Callable[[str], None] = lambda _: None, models: Sequence[str] = MODELS
) -> list[Fit]:
    """Plan every model with every method.

    Args:
        say: Called with one line for every model.
        models: Model names of `sinkgd plan`.
    """
    fits = []
    for model in models:
        say(f"planning {model} with {len(METHODS)} methods")
        fits += [fewest_devices(model, method) for method in METHODS]
    return fits


def judge(fits: Sequence[Fit]) -> Verdict:
    """State for each model the devices that the baseline needs, and the fewest of any method."""
    sentences, factors = [], []
    for model in dict.fromkeys(fit.model for fit in fits):
        own = {fit.method: fit for fit in fits if fit.model == model}
        fitting = [fit for fit in own.values() if fit.ranks is not None]
        if not fitting:
            sentences.append(f"{model} fits with no method on {RANKS[-1]} devices.")
            continue
        fewest = min(fit.ranks or 0 for fit in fitting)
        names = "; ".join(fit.title for fit in fitting if fit.ranks == fewest)
        base = own[BASELINE]
        needs = f"{base.ranks}" if base.ranks else f"more than {RANKS[-1]}"
        sentences.append(f"{model}: {base.title} needs {needs}; with {fewest}: {names}.")
        if base.ranks:
            factors.append((base.ranks / fewest, model))
    if not factors:
        return Verdict("The baseline fits nowhere.", tuple(sentences), _CAUTIONS)
    factor, model = max(factors)
    headline = f"Without state, 1/{factor:g} of AdamW’s devices can be enough ({model})."
    if factor <= 1:
        headline = "No method needs fewer devices than AdamW."
    return Verdict(headline, tuple(sentences), _CAUTIONS)


_CAUTIONS = (
    "Estimates: nothing of this was run. Peaks under FSDP are upper bounds (see Plan before you "
    "train).",
    "Only powers of two are tried as numbers of devices: a method that barely does not fit on n "
    "devices is listed with 2n.",
)


def fits_table(model: str, fits: Sequence[Fit]) -> TextTable:
    """Make a model's table."""
    own = [fit for fit in fits if fit.model == model]
    return TextTable(
        title=f"{model}: {count(own[0].parameters)} parameters",
        note="The fewest devices (H100 SXM, 72 of 80 GiB for training), the peak of one there, and "
        f"the device-hours for {count(TOKENS)} tokens.",
        columns=("method", "devices", "peak", "step", "device-hours"),
        rows=tuple(
            (
                fit.title,
                f"{fit.ranks}" if fit.ranks else f"more than {RANKS[-1]}",
                size(fit.peak_bytes),
                f"{fit.step_seconds:.2f} s",
                count(fit.device_hours),
            )
            for fit in sorted(own, key=lambda fit: (fit.ranks or RANKS[-1] + 1, fit.step_seconds))
        ),
    )


def write_fits(folder: Path, fits: Sequence[Fit], command: str) -> None:
    """Write ``study.jsonl`` atomically: the assumptions, then a line per model and method."""
    asked: dict[str, Any] = {"kind": "paper", "study": NAME, "naming": NAMING}
    asked["command"] = command
    asked |= {"device": asdict(find_device(DEVICE)), "usable": USABLE, "mfu": MFU, "tokens": TOKENS}
    lines = [asked, *({"kind": "fit", **asdict(fit)} for fit in fits)]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{STUDY_FILE}"
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(folder / STUDY_FILE)


def is_on_paper(path: Path) -> bool:
    """Whether a file is a study of estimates; False for an unreadable file."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return '"kind": "paper"' in file.readline()
    except OSError:
        return False


def read_fits(path: Path) -> tuple[str, list[Fit]]:
    """Read the command and the fits that `write_fits` wrote.

    Raises:
        ResultsError: If the file is missing or empty, or has a line that is not a record.
    """
    try:
        asked, *lines = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        naming = asked.get("naming", 1)
        command = command_now(asked["command"], naming)
        return command, [_fit_now(without_kind(line), naming) for line in lines]
    except (FileNotFoundError, NotADirectoryError):
        raise ResultsError(f"no study at {path}; `sinkgd experiment {NAME}` makes one") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} is not a study on paper of this version: {error!r}") from error


def _fit_now(fields: dict[str, Any], naming: int) -> Fit:
    """Read a fit and give its method the present name."""
    method = recipe_now(fields["method"], naming)
    renamed = {} if method == fields["method"] else {"title": find_method(method).title}
    return Fit(**{**fields, "method": method, **renamed})
