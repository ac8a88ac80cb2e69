"""The sources of the calculator's figures: the page's runs, papers, data sheets, assumptions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sinkgd.lab.devices import DEVICES, DeviceSheet
from sinkgd.lab.models import LLAMAS
from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import Analysis, Comparison, RecipeSummary, preset_of
from sinkgd.lab.report.published import (
    LARGEST,
    SINKGD,
    SIZES,
    SPEEDUPS,
    THROUGHPUT,
    THROUGHPUT_GPUS,
    TOKEN_FRACTION,
)
from sinkgd.lab.report.verdict import unequal_speed
from sinkgd.lab.results import Run

Kind = Literal["measured", "published", "assumed", "own"]
_PUBLISHED: Kind = "published"
_ASSUMED: Kind = "assumed"

_TOKENS_PER_PARAMETER = 20  # Hoffmann et al., https://arxiv.org/abs/2203.15556
# Throughput is published only at 1.3B.
_STEP_SPEEDUP = THROUGHPUT["SinkGD"] / THROUGHPUT["Adam"]


# Words in ``torch.cuda.get_device_name()``, e.g. "NVIDIA A100-SXM4-80GB". Boards whose name has one
# of the words in `_OTHER_BOARDS` are slower.
_TORCH_WORDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "h100": frozenset({"H100"}),
        "h200": frozenset({"H200"}),
        "b200": frozenset({"B200"}),
        "a100-80gb": frozenset({"A100", "80GB"}),
        "rtx-4090": frozenset({"RTX", "4090"}),
        "mi300x": frozenset({"MI300X"}),
    }
)
_OTHER_BOARDS = frozenset({"PCIE", "NVL", "LAPTOP", "D"})


@dataclass(frozen=True)
class ModelChoice:
    """A model, and the number of tokens it is trained on."""

    key: str
    title: str
    parameters: float
    tokens: float
    matrix_share: float  # fraction of the parameters in hidden matrices
    parameters_kind: Kind
    tokens_kind: Kind
    note: str


@dataclass(frozen=True)
class SpeedSource:
    """A speed of the baseline: tokens per second of one GPU."""

    key: str
    title: str
    value: float
    kind: Kind
    note: str


@dataclass(frozen=True)
class Candidate:
    """A method to compare with the baseline: the tokens that it needs, and the speed of a step."""

    title: str
    name: str  # the method's name in the result
    token_fraction: float  # tokens to the same loss, relative to the baseline
    step_speedup: float  # tokens per second, relative to the baseline
    tokens_kind: Kind
    speed_kind: Kind
    note: str


def model_choices(analysis: Analysis | None) -> tuple[ModelChoice, ...]:
    """List the model of the baseline's finished runs, if any, and all LLaMAs except the nanos."""
    published = {size.preset: size for size in (*SIZES, LARGEST)}
    choices = []
    own = _baseline_run(analysis)
    if own is not None and own.end is not None and own.end.tokens > 0:
        title = f"{preset_of(own)}, as on this page"
        sizes = float(own.start.parameters), float(own.end.tokens), _matrix_share(own)
        choices.append(
            ModelChoice("page", title, *sizes, "measured", "measured", "as trained here")
        )
    for name, config in LLAMAS.items():
        count = float(config.parameter_count)
        share = config.linear_parameter_count / count
        if name in published:
            tokens, kind, note = float(published[name].tokens), _PUBLISHED, "GaLore’s benchmark"
        else:
            tokens, kind = _TOKENS_PER_PARAMETER * count, _ASSUMED
            note = f"{_TOKENS_PER_PARAMETER} tokens per parameter"
        if not name.startswith("llama-nano"):  # their size depends on the text's vocabulary
            choices.append(ModelChoice(name, name, count, tokens, share, _PUBLISHED, kind, note))
    return tuple(choices)


def usual_model(models: tuple[ModelChoice, ...], analysis: Analysis | None) -> ModelChoice:
    """Choose the initial model: the page's if the baseline's device is known, else llama-1b."""
    if models[0].key == "page" and device_of(analysis) is not None:
        return models[0]
    return next(model for model in models if model.key == "llama-1b")


def measured_speed(analysis: Analysis | None) -> SpeedSource | None:
    """Return the baseline's speed per rank on this page; None if it did not run on a known GPU.

    The known GPUs are those in `sinkgd.lab.devices`. The speed of a CPU, or of another GPU, does
    not apply to the calculator's GPUs.
    """
    if device_of(analysis) is None:
        return None
    run = _baseline_run(analysis)
    speed = analysis.baseline.tokens_per_second if analysis and analysis.baseline else None
    if run is None or speed is None:
        return None
    device = run.start.environment.get("device", "an unnamed device")
    note = f"{preset_of(run)} on {device}"
    return SpeedSource("measured", "measured here", speed.mean / _ranks(run), "measured", note)


def published_speed() -> SpeedSource:
    """Return Adam's published speed, at 1.3B."""
    return SpeedSource(
        "published",
        "published, Adam at 1.3B",
        THROUGHPUT["Adam"] / THROUGHPUT_GPUS,
        "published",
        f"arXiv {SINKGD.arxiv}, on {THROUGHPUT_GPUS} A100",
    )


def candidates(analysis: Analysis | None) -> tuple[Candidate, ...]:
    """List methods to compare with the baseline: measured, then published, then assumed ones.

    Measured methods are sorted by the time to the baseline's loss, computed from tokens and speed.
    """
    paper = f"arXiv {SINKGD.arxiv}"
    against_adam = [one for one in reversed(SPEEDUPS) if one.against == "Adam"]
    published = [
        Candidate(
            f"SinkGD, published at {one.size}",
            "SinkGD",
            1 / one.steps,
            _STEP_SPEEDUP,
            "published",
            "published",
            f"{paper}: Adam takes {one.steps:g}× the steps"
            + ("" if one.size == "1.3B" else "; speed of a step as at 1.3B"),
        )
        for one in against_adam
    ]
    return (
        *_measured(analysis),
        *published,
        Candidate(
            "SinkGD, published in the abstract",
            "SinkGD",
            TOKEN_FRACTION,
            _STEP_SPEEDUP,
            "published",
            "published",
            f"{paper}, NeurIPS version; speed of a step as at 1.3B",
        ),
        Candidate(
            "no gain",
            "candidate",
            1.0,
            1.0,
            _ASSUMED,
            _ASSUMED,
            "if the baseline is tuned as well",
        ),
    )


def _measured(analysis: Analysis | None) -> list[Candidate]:
    if analysis is None or analysis.baseline is None:
        return []
    found = []
    with_speed = device_of(analysis) is not None and not unequal_speed(analysis)
    for recipe in analysis.candidates:
        comparison = analysis.comparisons.get(recipe.name)
        speedup = _speedup(recipe, analysis.baseline) if with_speed else 1.0
        if comparison is None or comparison.token_fraction is None or speedup is None:
            continue
        fraction = comparison.token_fraction.mean
        if fraction > 0:
            found.append(
                Candidate(
                    f"{recipe.name}, measured here",
                    recipe.name,
                    fraction,
                    speedup,
                    "measured",
                    "measured" if with_speed else _ASSUMED,
                    _caveat(recipe, comparison, with_speed=with_speed),
                )
            )
    return sorted(found, key=lambda one: (one.token_fraction / one.step_speedup, one.name))


def _speedup(recipe: RecipeSummary, baseline: RecipeSummary) -> float | None:
    if recipe.tokens_per_second is None or baseline.tokens_per_second is None:
        return None
    return recipe.tokens_per_second.mean / baseline.tokens_per_second.mean


def _caveat(recipe: RecipeSummary, comparison: Comparison, *, with_speed: bool) -> str:
    """Describe the evidence for a measured gain."""
    run = recipe.finished[0]
    words = [f"at {quantities.count(run.start.parameters)} parameters"]
    words.append(f"{comparison.runs} runs" if comparison.runs > 1 else "a single run")
    if comparison.level:
        words.append("level at the end")
    speed = "" if with_speed else "; equal speed assumed"
    return f"{', '.join(words)}; unknown at other sizes{speed}"


def device_of(analysis: Analysis | None) -> DeviceSheet | None:
    """Find the device of the baseline's first finished run in `DEVICES`, by torch's name for it."""
    run = _baseline_run(analysis)
    name = str(run.start.environment.get("device", "")) if run else ""
    words = set(name.upper().replace("-", " ").split())
    if words & _OTHER_BOARDS:
        return None
    return next((DEVICES[key] for key, needed in _TORCH_WORDS.items() if needed <= words), None)


def _baseline_run(analysis: Analysis | None) -> Run | None:
    if analysis is None or analysis.baseline is None or not analysis.baseline.finished:
        return None
    return analysis.baseline.finished[0]


def _matrix_share(run: Run) -> float:
    """Return the fraction of the parameters in hidden matrices, for the run's preset.

    If the preset is not a LLaMA, return the fraction for llama-1b.
    """
    config = LLAMAS.get(preset_of(run))
    if config is None:
        config = LLAMAS["llama-1b"]
    elif run.start.parameters > config.linear_parameter_count:  # not only adapters are trained
        return config.linear_parameter_count / run.start.parameters  # with the run's vocabulary
    return config.linear_parameter_count / config.parameter_count


def _ranks(run: Run) -> int:
    """Return the number of ranks of a run; one if its record has no mesh."""
    return math.prod(run.start.environment.get("mesh", {}).values())
