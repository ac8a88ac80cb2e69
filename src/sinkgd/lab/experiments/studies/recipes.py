"""Which additions to the default recipe reduce the number of tokens that it needs."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from sinkgd.lab.experiments.arms import Arm, Grid
from sinkgd.lab.experiments.studies.settings import BENCHMARK, LR, MACHINE, MATRIX_LR
from sinkgd.lab.experiments.study import Setting, Study
from sinkgd.lab.experiments.study_results import StudyResults
from sinkgd.lab.experiments.study_verdict import (
    Verdict,
    against_controls,
    cautions,
    compared,
    ended,
    fewest_tokens,
    lower_controls,
    names,
    ranked,
    unfinished,
)

DEFAULT = "default"
WEIGHT_DECAY = "optimizer.weight_decay"

# Like the study `table1`, but longer: 1.64M tokens, 32 sequences of 128 tokens per step; about 4
# minutes of one core per run.
LONG = replace(
    MACHINE,
    training=replace(MACHINE.training, steps=400, batch_size=32),
    evaluation=replace(MACHINE.evaluation, every_steps=20),
)


class Addition(NamedTuple):
    """What an arm adds to the default recipe."""

    options: Mapping[str, Any]
    grid: Grid
    paper_grid: Grid
    # Bytes of state per entry of a hidden matrix; state per row or column is not counted.
    bytes_per_entry: int = 0
    # Further fields of a run at the scale of a machine.
    at_machine: Mapping[str, Any] = MappingProxyType({})


def _rates(*values: float) -> Grid:
    return {LR: (0.08,), MATRIX_LR: values}


def _paper_rates(*values: float) -> Grid:
    return {LR: (0.02,), MATRIX_LR: values}


USUAL, PAPER = _rates(0.002, 0.004, 0.008), _paper_rates(0.001, 0.002, 0.004)
# An average of updates is about a third as long as an update, so its best rate is higher.
AVERAGED, PAPER_AVERAGED = _rates(0.004, 0.008, 0.016), _paper_rates(0.002, 0.004, 0.008)
# Decay of 0.3 was the best of three by itself.
RANK_AND_DECAY = {"deflated_rank": 30, "cautious_decay": True, "weight_decay": 0.3}

ADDITIONS: Mapping[str, Addition] = {
    DEFAULT: Addition({}, USUAL, PAPER),
    "cautious-decay": Addition(
        {"cautious_decay": True, "weight_decay": 0.1},
        {LR: (0.08,), MATRIX_LR: (0.004,), WEIGHT_DECAY: (0.03, 0.1, 0.3)},
        {LR: (0.02,), MATRIX_LR: (0.002,), WEIGHT_DECAY: (0.03, 0.1, 0.3)},
    ),
    "weight-projection": Addition({"weight_projection": True}, USUAL, PAPER),
    # Here a rate is relative to the root mean square of the weights, which begins at 0.02.
    "constant-norm": Addition(
        {"constant_norm": True}, _rates(0.05, 0.1, 0.2), _paper_rates(0.05, 0.1, 0.2)
    ),
    "kept-directions": Addition({"deflated_start": "kept"}, USUAL, PAPER),
    "low-rank-momentum": Addition({"momentum_rank": 16}, USUAL, PAPER),
    # The scales come from half of the sequences of a step.
    "cross-fit": Addition(
        {"cross_fit": True},
        USUAL,
        PAPER,
        at_machine={"training.micro_batch_size": LONG.training.batch_size // 2},
    ),
    "averaged-scales": Addition({"averaged_scales": 0.9}, USUAL, PAPER),
    "rank-30": Addition({"deflated_rank": 30}, USUAL, PAPER),
    # The best two and the best three by themselves, together.
    "rank-30-cautious": Addition(RANK_AND_DECAY, USUAL, PAPER),
    "rank-30-cautious-kept": Addition({**RANK_AND_DECAY, "deflated_start": "kept"}, USUAL, PAPER),
    "8-bit-momentum": Addition(
        {"momentum": 0.9, "momentum_place": "after", "momentum_bits": 8},
        AVERAGED,
        PAPER_AVERAGED,
        bytes_per_entry=1,
    ),
    "8-bit-momentum-0.5": Addition(
        {"momentum": 0.5, "momentum_place": "after", "momentum_bits": 8},
        USUAL,
        PAPER,
        bytes_per_entry=1,
    ),
    "momentum": Addition({"momentum": 0.95, "nesterov": True}, USUAL, PAPER, bytes_per_entry=4),
    "momentum-0.5": Addition({"momentum": 0.5}, USUAL, PAPER, bytes_per_entry=4),
    "row-momentum": Addition(
        {"recipe": "rows-only", "momentum": 0.95, "nesterov": True},
        _rates(0.001, 0.002, 0.004),
        _paper_rates(0.0005, 0.001, 0.002),
        bytes_per_entry=4,
    ),
}
_OF_ADAMW = _rates(0.003, 0.006, 0.012), _paper_rates(0.0005, 0.001, 0.003)
_OF_MUON = _rates(0.005, 0.01, 0.02), _paper_rates(0.001, 0.005, 0.01)
# What defines each control, and its grids. "-0.5" means 0.5 for the beta1 of AdamW, or for the
# momentum of Muon.
CONTROLS: Mapping[str, tuple[Mapping[str, str | float], tuple[Grid, Grid]]] = {
    "adamw": ({"optimizer.recipe": "adamw"}, _OF_ADAMW),
    "adamw-0.5": ({"optimizer.recipe": "adamw", "optimizer.beta1": 0.5}, _OF_ADAMW),
    "muon": ({"optimizer.recipe": "muon"}, _OF_MUON),
    "muon-0.5": ({"optimizer.recipe": "muon", "optimizer.momentum": 0.5}, _OF_MUON),
}


def _arms(*, paper: bool) -> tuple[Arm, ...]:
    candidates = [
        Arm(
            name,
            {
                "optimizer.recipe": "sinkgd",
                **{f"optimizer.{option}": value for option, value in own.options.items()},
                **({} if paper else own.at_machine),
            },
            own.paper_grid if paper else own.grid,
            widened=True,
        )
        for name, own in ADDITIONS.items()
    ]
    controls = [
        Arm(name, overrides, grids[paper], control=True, widened=True)
        for name, (overrides, grids) in CONTROLS.items()
    ]
    return (*candidates, *controls)


def judge(results: StudyResults) -> Verdict:
    """Compare each addition with the default, and the best arm with the controls.

    For each control, also name the arm that needs the fewest tokens to reach the control's final
    loss: once among arms without state for each matrix entry, and once among those with at most a
    byte.
    """
    if (nothing := unfinished(results)) is not None:
        return nothing
    default = results.arm(DEFAULT)
    others = ranked([one for one in results.candidates if one is not default])
    if default is None or not others:
        return Verdict(
            f"{ended(ranked(results.candidates)[0])}; there is nothing to compare it with.",
            (),
            tuple(cautions(results)),
        )
    kept = {name: own.bytes_per_entry for name, own in ADDITIONS.items()}
    lower = [one for one in others if results.difference(one, default).lower]
    headline = (
        f"{ended(default)}. Lower by more than the spread of seeds: "
        + (", ".join(map(ended, lower)) or "nothing")
        + "."
    )
    best = ranked(results.candidates)[0]
    if below := lower_controls(results, best):
        headline += f" {names(below)} ended lower than {best.arm.name}."
    sentences = [
        fewest_tokens(results, control, who, [name for name in kept if kept[name] <= most])
        for control in results.controls
        for who, most in (
            ("without state for each matrix entry", 0),
            ("with at most one byte of state for each matrix entry", 1),
        )
    ]
    sentences += [
        compared(one.arm.name, results.difference(one, default), DEFAULT) for one in others
    ]
    sentences += against_controls(results, best)
    return Verdict(headline, tuple(sentences), tuple(cautions(results)))


RECIPES = Study(
    name="recipes",
    question="What, added to the default recipe, lets it need fewer tokens?",
    background="Published additions to optimizers like SinkGD: cautious weight decay (Chen et al. "
    "2025), updates without their part along the weight (Nora), weights of constant norm "
    "(Hyperball), directions kept from step to step (Spectra), momentum of low rank (LoRA-Pre) or "
    "in 8 bits (PowerStep), and normalizing the rows of a momentum (RMNP). Each is added to the "
    "default by itself, except RMNP, which replaces it. Momentum of 0.95 and of 0.5 and a deflated "
    "rank of 30 are tried, too, and so are the best two together, and the best three. "
    "AdamW and Muon are controls, each also with a momentum of 0.5.",
    settings={
        "machine": Setting(LONG, _arms(paper=False)),
        "paper": Setting(BENCHMARK["llama-60m"], _arms(paper=True), models=BENCHMARK),
    },
    judge=judge,
)
